"""The result as JSON, and as tables and plots of a Markdown page."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib as mpl
import onnxruntime as ort
from matplotlib.figure import Figure
from tabulate import tabulate

LIMIT = "in-process limit"
_BEGIN, _END = "<!-- measured: written by make bench -->", "<!-- end -->"


def machine() -> dict[str, Any]:
    """What the numbers hold for."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    names = [line.split(":")[1].strip() for line in info.splitlines() if "model name" in line]
    flags = next((line for line in info.splitlines() if line.startswith("flags")), "").split()
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "vector": [
            f for f in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8") if f in flags
        ],
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "onnxruntime": ort.__version__,
        "pillow": version("pillow"),
        "torch": version("torch"),
    }


def write_results(path: Path, result: dict[str, Any]) -> None:
    """Write the result as JSON."""
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def write_page(page: Path, result: dict[str, Any]) -> None:
    """Replace what an earlier run wrote into a page, and the plot beside it."""
    plot = page.with_name("benchmarks.svg")
    _plot(plot, result)
    parts = [_conditions(result), _best(result["rows"]), f"![Throughput and p99]({plot.name})"]
    parts += [_all(result["rows"]), _growth(result), _compilation(result["compilation"])]
    measured = "\n\n".join(part for part in parts if part)
    replace_part(page, measured, begin=_BEGIN)


def replace_part(page: Path, measured: str, *, begin: str) -> None:
    """Replace what stands in a page between a line and the next end."""
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(_END)
    page.write_text(f"{before}{begin}\n\n{measured}\n\n{_END}{after}", encoding="utf-8")


def best_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each subject and precision, the concurrency with the highest throughput."""
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        key = (row["name"], row["precision"])
        if key not in best or row["throughput"] > best[key]["throughput"]:
            best[key] = row
    return list(best.values())


def _conditions(result: dict[str, Any]) -> str:
    facts = result["machine"]
    vectors = ", ".join(facts["vector"])
    return (
        f"`{result['command']}` on {facts['cores']} cores of {facts['processor']} ({vectors}), "
        f"load {facts['load_before']:.1f} before; Python {facts['python']}, ONNX Runtime "
        f"{facts['onnxruntime']}, Pillow {facts['pillow']}, PyTorch {facts['torch']}. "
        f"{result['images']['count']} images of {result['images']['kilobytes']:.0f} kB on average; "
        f"{result['rounds']} rounds of {result['seconds']:g} s a row."
        f"{_failed(result['failed'])}"
    )


def _failed(why: dict[str, str]) -> str:
    if not why:
        return ""
    return f" Not measured: {'; '.join(f'{name} ({reason})' for name, reason in why.items())}."


def _best(rows: list[dict[str, Any]]) -> str:
    best = best_rows(rows)
    base = {row["name"]: row["throughput"] for row in best if row["precision"] == "fp32"}
    limit = base[LIMIT]
    stock = next((rate for name, rate in base.items() if "image_classifier" in name), None)
    table = [
        (
            row["name"],
            row["precision"],
            row["concurrency"],
            f"{row['throughput']:.1f}",
            f"{row['throughput'] / limit:.2f}",
            f"{row['throughput'] / stock:.2f}" if stock else "",
            *(f"{row[key]:.0f}" for key in ("p50_ms", "p95_ms", "p99_ms")),
            f"{row['memory_mb']:.0f}" if row["memory_mb"] else "",
            f"{row['start_s']:.1f}" if row["start_s"] else "",
            row["body"] or "",
        )
        for row in sorted(best, key=lambda row: -row["throughput"])
    ]
    headers = (
        "server", "graph", "clients", "images/s", "of the limit", "of stock", "p50 ms", "p95 ms",
        "p99 ms", "memory MB", "start s", "body",
    )  # fmt: skip
    title = "At each one's best concurrency; `of the limit` is the share of the fp32 limit:"
    return f"{title}\n\n{_markdown(table, headers)}"


def _all(rows: list[dict[str, Any]]) -> str:
    table = [
        (
            row["name"],
            row["precision"],
            row["concurrency"],
            f"{row['throughput']:.1f}",
            *(f"{row[key]:.0f}" for key in ("p50_ms", "p95_ms", "p99_ms")),
            row["requests"],
            row["failures"],
            f"{row['server_ms']:.2f}",
            *(
                ("", "")
                if row["name"] == LIMIT
                else (f"{row['client_ms']:.2f}", f"{row['others']:.0%}")
            ),
        )
        for row in rows
    ]
    headers = (
        "server", "graph", "clients", "images/s", "p50 ms", "p95 ms", "p99 ms", "requests",
        "failed", "CPU ms", "client CPU ms", "others",
    )  # fmt: skip
    return f"By concurrency:\n\n{_markdown(table, headers)}"


def _growth(result: dict[str, Any]) -> str:
    if result["growth"] is None:
        return ""
    sizes = [
        (
            row["side"],
            f"{row['bytes'] / 1e3:.0f}",
            *(f"{row[key]:.1f}" for key in ("exact", "scaled", "forward")),
        )
        for row in result["growth"]["by_size"]
    ]
    batches = [(row["batch"], f"{row['image']:.1f}") for row in result["growth"]["by_batch"]]
    size_headers = ("shorter side", "kB", "decode + preprocess, exact", "scaled", "forward")
    return (
        "By size of a JPEG file, ms on one core:\n\n"
        f"{_markdown(sizes, size_headers)}\n\n"
        "Forward pass by batch, ms an image on one core:\n\n"
        f"{_markdown(batches, ('batch', 'ms an image'))}"
    )


def _compilation(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    table = [
        (
            one["name"],
            f"{one['accuracy']:.3f}",
            one["labels_changed"],
            *(f"{one[key]:.3f}" for key in ("difference_p95", "difference_max")),
            f"{one['milliseconds']:.1f}",
            f"{one['speedup']:.2f}",
            "passed" if one["passed"] else "refused",
        )
        for one in found["candidates"]
    ]
    headers = (
        "graph", "accuracy", "labels changed", "difference p95", "max", "ms", "speed-up", "gate",
    )  # fmt: skip
    title = f"`cxr compile` on {found['images']} validation images; chosen: `{found['chosen']}`:"
    return f"{title}\n\n{_markdown(table, headers)}"


def _markdown(table: list[tuple[Any, ...]], headers: tuple[str, ...]) -> str:
    text: str = tabulate(table, headers=headers, tablefmt="github", disable_numparse=True)
    return text


def _plot(path: Path, result: dict[str, Any]) -> None:
    rows = [row for row in result["rows"] if row["name"] != LIMIT]
    limit = {row["precision"]: row["throughput"] for row in result["rows"] if row["name"] == LIMIT}
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    # One colour a server: there are more lines than colours that can be told apart.
    names = list(dict.fromkeys(row["name"] for row in rows))
    for name, precision in dict.fromkeys((row["name"], row["precision"]) for row in rows):
        own = [r for r in rows if (r["name"], r["precision"]) == (name, precision)]
        label = name if precision == "fp32" else f"{name}, {precision}"
        style = {
            "color": f"C{names.index(name)}",
            "marker": "o" if precision == "fp32" else "s",
            "label": label,
            "linestyle": "-" if "cxr" in name else "--",
        }
        left.plot([r["concurrency"] for r in own], [r["throughput"] for r in own], **style)
        right.plot([r["concurrency"] for r in own], [r["p99_ms"] for r in own], **style)
    for precision, rate in limit.items():
        left.axhline(
            rate, color="black", linewidth=0.8, linestyle=":" if precision != "fp32" else "-"
        )
        left.annotate(f"limit, {precision}", (1, rate), fontsize=7, va="bottom")
    ticks = sorted({row["concurrency"] for row in rows})
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
    left.set(xlabel="clients", ylabel="images/s", ylim=(0, None))
    right.set(xlabel="clients", ylabel="p99, ms", yscale="log")
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8
    )
    # The same numbers give the same file.
    with mpl.rc_context({"svg.hashsalt": "cxr", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})
