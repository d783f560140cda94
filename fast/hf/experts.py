"""transformers' experts on fused_experts: one function for every class whose weights are stacks and whose gate is known."""

from ref.combine import fuse

from ..layers.experts import FusedExperts
from ..layers.online import is_experts
from ..quantize import quantize

# transformers' activation functions, by the names of their classes, and fused_experts' names.
ACTIVATIONS = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "ReLUSquaredActivation": "relu2",
}
# Experts with a gate of their own: its name here, and which of their attributes are its parameters.
GATES = {"GptOssExperts": ("swigluoai", ("alpha", "limit"))}


class Experts(FusedExperts):
    """What takes the place of one of transformers' experts modules: its forward, with its own activation and biases.

    names: the two parameters of the module that w13 and w2 are, as ("gate_up_proj", "down_proj").
    """

    def __init__(self, module, w13, w2, x_format=None):
        """
        Args:
            module: transformers' experts. w13, w2: QTensors (e, n, k), as module's own weights; transposed where module's are.

        Raises:
            NotImplementedError: an activation that fused_experts does not have.
            ValueError: weights that do not fit each other.
        """
        name, parameters = activation(module)
        names = weight_names(module)
        bias13, bias2 = (getattr(module, f"{weight}_bias") if module.has_bias else None for weight in names)
        super().__init__(w13, w2, activation=name, bias13=bias13, bias2=bias2, x_format=x_format, **parameters)
        self.names = names

    def forward(self, hidden_states, top_k_index, top_k_weights):
        """hidden_states (m, h), top_k_index and top_k_weights (m, t) -> (m, h)."""
        return super().forward(hidden_states, top_k_weights, top_k_index)


def weight_names(module):
    """The names of the weights of experts, or of an nn.Linear."""
    if not is_experts(module):
        return ("weight",)
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def activation(module):
    """fused_experts' name for what is between the module's products, and its parameters.

    Raises:
        NotImplementedError: there is none; the message names module and activation.
    """
    kind = type(module).__name__
    if getattr(module, "has_post_expert_norm", False):
        raise NotImplementedError(f"{kind} has a norm behind each expert, and fused_experts has none; leave it out by `ignore`")
    if kind in GATES:
        name, attributes = GATES[kind]
        return name, {attribute: getattr(module, attribute) for attribute in attributes}
    own = type(module)._apply_gate.__name__ != "_default_apply_gate"
    function = type(getattr(module, "act_fn", None)).__name__
    if own or function not in ACTIVATIONS or not module.is_concatenated:
        what = "a gate of its own" if own else f"the activation {function}"
        known = ", ".join((*ACTIVATIONS, *GATES))
        raise NotImplementedError(f"{kind} has {what}; there is {known}; leave it out by `ignore`")
    return ACTIVATIONS[function] + ("" if module.has_gate else "_no_mul"), {}


def convert(module, chosen):
    """One of transformers' experts modules, quantized as a LayerConfig says.

    Returns:
        Experts.

    Raises:
        NotImplementedError: as activation.
    """
    activation(module)
    return Experts(
        module, *(quantized(module, name, getattr(module, name), chosen.weight) for name in weight_names(module)), chosen.x_format
    )


def quantized(module, name, weight, format):
    """One of module's weights as a QTensor (e, n, k); gate and up each by itself, since checkpoints store them so.

    Args:
        name: of the weight. weight: the tensor, as module has it. format: what it is quantized to.
    """
    w = weight.detach().mT if module.is_transposed else weight.detach()
    if name == "gate_up_proj" and module.is_concatenated:
        return fuse([quantize(half, format) for half in w.chunk(2, dim=1)])
    return quantize(w, format)
