"""Saves models reproducibly: the same module gives the same bytes, whichever machine and folder made them."""

import os
import sys
from pathlib import Path

import torch

WRITTEN_BY_THE_WRITER = {"version", "byteorder", ".data/serialization_id"}


def fix_hash_seed() -> None:
    """Starts this script again with Python's string hashes fixed: torch.jit.script writes a module's constants in the
    order of a set."""
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"PYTHONHASHSEED": "0"})


def save_script(module: torch.jit.ScriptModule, path: Path) -> None:
    """Saves `module` without its debug records, which hold the source paths of the machine that made it."""
    module.save(str(path))
    reader = torch._C.PyTorchFileReader(str(path))
    records = {name: reader.get_record(name) for name in reader.get_all_records()}
    del reader
    writer = torch._C.PyTorchFileWriter(str(path))
    for name, content in records.items():
        if not name.endswith(".debug_pkl") and name not in WRITTEN_BY_THE_WRITER:
            writer.write_record(name, content, len(content))
    writer.write_end_of_file()


def save_exported(program: torch.export.ExportedProgram, path: Path) -> None:
    """Saves `program` without its stack traces, for the same reason."""
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    torch.export.save(program, path)
