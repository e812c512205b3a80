"""What a CPU needs so that the same sums give the same bits."""

import torch


def settle_vector_math() -> None:
    """Call each of MKL's vector functions that torch uses once, on this thread alone.

    MKL picks a function's kernel at its first call. Where two threads make that call at once, one of them can get a
    kernel of half the digits for it (errors of 1e-4; seen in 1 to 3 of 1,000 processes), which no later call repeats.
    Source: pytorch issue 188792.
    """
    one = torch.ones(1)
    for function in (torch.exp, torch.log, torch.sqrt, torch.sin, torch.cos, torch.tanh, torch.erf, torch.expm1):
        function(one)
