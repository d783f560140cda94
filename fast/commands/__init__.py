"""The commands of python -m fast, one module each: add_arguments(parser), and run(args), which returns the exit code."""

COMMANDS = {
    "quantize": "quantize a Hugging Face checkpoint, one tensor at a time",
    "bench-layer": "time one quantized linear layer beside the 16-bit one",
    "explain": "which implementation runs a layer, or each layer of a checkpoint, and why",
}
EXIT_CODES = (
    "exit codes: 0 done; 1 failed on the way; 2 refused before anything was done (arguments, input, output folder); 130 interrupted"
)
