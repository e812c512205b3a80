"""A workaround for MKL, so that the same sums give the same bits on a CPU."""

import torch


def settle_vector_math() -> None:
    """Call each of MKL's vector functions that torch uses once, from one thread.

    MKL chooses a function's kernel at its first call. If two threads make that call at once, one of them can get a
    kernel of half precision for it (errors of 1e-4; seen in 1 to 3 of 1,000 processes). Later calls are right. Source:
    pytorch issue 188792.
    """
    one = torch.ones(1)
    for function in (torch.exp, torch.log, torch.sqrt, torch.sin, torch.cos, torch.tanh, torch.erf, torch.expm1):
        function(one)
