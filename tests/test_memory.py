"""What becomes of memory that is freed."""

import os
import subprocess
import sys

import pytest

ROUNDS = """
import resource

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def rounds():
    for _ in range(5):
        before = faults()
        [bytearray(8 << 20) for _ in range(16)]
    print(faults() - before)
"""
IN_A_COMMAND = "from mdm_models.commands.line import exit_code\nexit_code('mdm', rounds)"
PAGES = (128 << 20) // os.sysconf("SC_PAGE_SIZE")  # of a round


def faults(program: str, **environment: str) -> int:
    """Pages that the system had to give for the last of some rounds of 128 MB, each freed in whole."""
    unset = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", ROUNDS + program]
    return int(subprocess.run(command, env=unset | environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="of glibc alone")
def test_commands_keep_freed_memory_unless_told_otherwise_and_other_programs_do_not():
    assert faults(IN_A_COMMAND) < PAGES / 10
    assert faults(IN_A_COMMAND, MALLOC_TRIM_THRESHOLD_="131072") > PAGES / 2
    assert faults(IN_A_COMMAND, GLIBC_TUNABLES="glibc.malloc.trim_threshold=131072") > PAGES / 2
    assert faults("import mdm_models, mdm_kernels, mdm_models.commands.line\nrounds()") > PAGES / 2
