"""The order in which implementations are tried, as measured on one H200 (the README has the figures)."""

# From m > 2^6 on, Humming's tiles beat the Triton kernels' where Humming takes the format.
HUMMING_FROM = 7


def preference(request, bucket):
    """Names of implementations, fastest first, for calls with 2^(bucket-1) < m <= 2^bucket."""
    if request.device.type != "cuda":
        return ["torch"]
    if request.x_format is not None:
        return ["cublas", "humming", "triton", "torch"] if bucket >= HUMMING_FROM else ["cublas", "triton", "humming", "torch"]
    return ["humming", "triton", "torch"] if bucket >= HUMMING_FROM else ["triton", "humming", "torch"]
