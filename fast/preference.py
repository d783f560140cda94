"""The order in which implementations are tried, as measured."""


def preference(request, bucket):
    """Names of implementations, fastest first, for calls with 2^(bucket-1) < m <= 2^bucket."""
    if request.device.type != "cuda":
        return ["torch"]
    return ["triton", "humming", "torch"]
