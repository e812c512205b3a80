"""This machine's processor, as Linux describes it."""

import re
from pathlib import Path

from trnlora.errors import UserError

CPU_INFO = Path("/proc/cpuinfo")


def cpu_info(name: str) -> str:
    """The first processor's entry of that name, such as "model name", "vendor_id" or "flags"; "" if there is none."""
    try:
        found = re.search(rf"^{name}\s*: (.+)$", CPU_INFO.read_text("utf-8"), re.MULTILINE)
    except OSError:  # not Linux
        return ""
    return found[1] if found else ""


def check_bf16_products() -> None:
    """Raise UserError if the processor has no fast products in bfloat16, for train.matmul_precision."""
    if not {"avx512_bf16", "amx_bf16"} & set(cpu_info("flags").split()):
        raise UserError("train.matmul_precision: bf16 needs a processor with AVX512-BF16 or AMX: write highest")
