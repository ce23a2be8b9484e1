"""A model in 8 bits as tsquant writes it, the float model, and ONNX Runtime's static quantization of the same model on the same
calibration data, each in a process of its own, one after the other, several rounds of all, as milliseconds by batch size. Since the clock
of a machine may change within minutes, the second table compares within rounds:

    tsquant quantize EXPERIMENT.yaml --set output.format=int8 --set output.dir=RUN
    python benches/compare_onnxruntime.py RUN

Needs torch, numpy, safetensors, pyyaml, onnx and onnxruntime. The model takes one tensor; transforms that resize or crop are refused.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy
import torch
import yaml

OWN = "tsquant int8"
KINDS = ["float, frozen", "float, optimize_for_inference", OWN, "ONNX Runtime float", "ONNX Runtime int8"]


def rows(section: dict) -> torch.Tensor:
    """The input of the model, all rows of a section's data."""
    path, inputs = pathlib.Path(section["data"]), section["inputs"]
    names = inputs if isinstance(inputs, list) else list(inputs.values())
    if len(names) != 1 or not isinstance(names[0], str):
        sys.exit(f"expected a model with one tensor as input, found {inputs}")
    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        values = load_file(path)[names[0]]
    elif path.suffix == ".npz":
        values = numpy.load(path)[names[0]]
    else:
        sys.exit(f"expected .npz or .safetensors as data, found {path}")
    values = torch.from_numpy(values[: section["samples"]])
    transform = section["transform"]
    if transform["resize"] or transform["crop"]:
        sys.exit("expected data that needs no resize and no crop")
    if transform["layout"] == "nhwc":
        values = values.permute(0, 3, 1, 2)
    values = values.to(torch.float32).contiguous() * (1.0 if transform["scale"] is None else transform["scale"])
    for key, operation in (("mean", torch.sub), ("std", torch.div)):
        if transform[key] is not None:
            numbers = torch.tensor(transform[key]).reshape(-1, *[1] * (values.dim() - 2))
            values = operation(values, numbers)
    return values


def export(model: pathlib.Path, calibration: torch.Tensor, folder: pathlib.Path) -> None:
    """float.onnx and int8.onnx: per channel, QDQ, min/max, as ONNX Runtime quantizes by default."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    torch.onnx.export(
        torch.jit.load(str(model)).eval(),
        (calibration[:2],),
        str(folder / "float.onnx"),
        input_names=["x"],
        output_names=["y"],
        dynamic_axes={"x": {0: "n"}, "y": {0: "n"}},
        dynamo=False,
    )
    quant_pre_process(str(folder / "float.onnx"), str(folder / "prepared.onnx"))

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(calibration.split(8))

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {"x": batch.numpy()}

    quantize_static(
        str(folder / "prepared.onnx"),
        str(folder / "int8.onnx"),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def runner(kind: str, plan: dict, run: pathlib.Path, folder: pathlib.Path, threads: int):
    """A function from a batch to the outputs."""
    if kind.startswith("ONNX"):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        name = "int8.onnx" if kind.endswith("int8") else "float.onnx"
        session = onnxruntime.InferenceSession(str(folder / name), options, providers=["CPUExecutionProvider"])
        return lambda batch: torch.from_numpy(session.run(None, {"x": batch.numpy()})[0])
    torch.set_num_threads(threads)
    if kind == OWN:
        torch.backends.quantized.engine = plan["output"]["engine"]
        return torch.jit.freeze(torch.jit.load(str(run / int8_file(plan))).eval())
    model = torch.jit.freeze(torch.jit.load(plan["model"]["path"]).eval())
    return torch.jit.optimize_for_inference(model) if kind.endswith("inference") else model


def int8_file(plan: dict) -> str:
    formats = plan["output"]["format"]
    formats = [formats] if isinstance(formats, str) else formats
    if "int8" not in formats:
        sys.exit(f"expected a run with the format int8, found {formats}")
    return "quantized.pt" if formats[0] == "int8" else "quantized_int8.pt"


def measure(kind: str, plan: dict, run: pathlib.Path, folder: pathlib.Path, options: argparse.Namespace) -> dict:
    """Milliseconds by batch size, and the outputs of the first rows."""
    section = plan["evaluation"] or plan["calibration"]
    data = rows(section)[:64]
    with torch.inference_mode():
        forward = runner(kind, plan, run, folder, options.threads)
        outputs = torch.cat([forward(batch) for batch in data.split(8)])
        found = {}
        for size in options.batch_sizes:
            batch = data[:size].contiguous()
            for _ in range(5):
                forward(batch)
            times = []
            start = time.perf_counter()
            while len(times) < 10 or time.perf_counter() - start < options.seconds:
                before = time.perf_counter()
                forward(batch)
                times.append(1000 * (time.perf_counter() - before))
            found[size] = [statistics.median(times), min(times)]
    numpy.save(folder / f"{KINDS.index(kind)}.npy", outputs.numpy())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=pathlib.Path, help="a run directory of tsquant, format int8")
    parser.add_argument("--batch-sizes", type=lambda text: [int(part) for part in text.split(",")], default=[1, 4, 8])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=3.0, help="at least so long for each batch size")
    parser.add_argument("--rounds", type=int, default=3, help="how often all are run")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    plan = yaml.safe_load((options.run / "experiment.yaml").read_text())
    if options.one is not None:
        print(json.dumps(measure(options.one, plan, options.run, options.folder, options)))
        return
    int8_file(plan)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        export(pathlib.Path(plan["model"]["path"]), rows(plan["calibration"]), folder)
        rounds = [[run_alone(kind, folder) for kind in KINDS] for _ in range(options.rounds)]
        shown = ", ".join(str(size) for size in options.batch_sizes)
        print(f"{options.threads} threads, {options.rounds} rounds; milliseconds for batches of {shown}: median of rounds (best of all)")
        for index, kind in enumerate(KINDS):
            times = " | ".join(f"{median:8.2f} ({best:.2f})" for median, best in summary([found[index] for found in rounds]))
            outputs, float_outputs = (numpy.load(folder / f"{i}.npy").astype(numpy.float64) for i in (index, 0))
            noise = ((outputs - float_outputs) ** 2).sum()
            sqnr = 10 * numpy.log10((float_outputs**2).sum() / noise) if noise > 0 else numpy.inf
            agreement = (outputs.argmax(-1) == float_outputs.argmax(-1)).mean()
            print(f"| {kind:29} | {times} | {sqnr:6.2f} dB | {agreement:.3f} |")
        own = KINDS.index(OWN)
        print(f"{OWN}, times as fast as the others: median of rounds (least to most)")
        for index, kind in enumerate(KINDS):
            if index == own:
                continue
            ratios = [[other[0] / ours[0] for ours, other in zip(found[own], found[index])] for found in rounds]
            cells = " | ".join(f"{statistics.median(row):.2f} ({min(row):.2f} to {max(row):.2f})" for row in zip(*ratios))
            print(f"| {kind:29} | {cells} |")


def run_alone(kind: str, folder: pathlib.Path) -> list[list[float]]:
    """Median and best milliseconds by batch size, measured in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", kind, "--folder", str(folder)]
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return list(json.loads(ran.stdout.splitlines()[-1]).values())


def summary(rounds: list[list[list[float]]]) -> list[tuple[float, float]]:
    """By batch size the median of the rounds' medians, and the best of their bests."""
    by_size = zip(*rounds)
    return [(statistics.median(m for m, _ in found), min(best for _, best in found)) for found in by_size]


if __name__ == "__main__":
    main()
