"""The command ``lumiere-fast``: generate, train, assemble, evaluate, info.

Whatever a user can get wrong ends in one line on stderr and exit code 2, with nothing written; Ctrl-C ends in 130.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from lumiere_fast import dispatch, info, training
from lumiere_fast.pipelines import LumiereOutput, LumierePipeline
from lumiere_fast.training.evaluation import EVALUATION_SEED
from lumiere_fast.video import check_output, write_video

INTERRUPTED = 130  # what a shell reports for Ctrl-C
REFUSED = 2

# Typer has click inside it or beside it, depending on its version. Either way this is the base of its usage errors.
_ClickException: type[Exception] = typer.BadParameter.__mro__[2]

# What bad input raises here and below; anything else is a defect of ours, and keeps its traceback.
_REFUSALS = (
    ValueError,
    OSError,
    ModuleNotFoundError,
    dispatch.BackendUnavailable,
)

app = typer.Typer(
    help="Lumiere: text to video by a Space-Time U-Net.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Equal seeds give equal results.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps of the base model.")]
Guidance = Annotated[float | None, typer.Option(min=0, help="Guidance scale; 1 turns guidance off.")]
Backend = Annotated[
    str | None, typer.Option(help=f"Force a backend: {', '.join(dispatch.BACKENDS)}; or {dispatch.AUTO}.")
]
Threads = Annotated[
    int | None, typer.Option(min=1, max=256, help="CPU threads.  [default: torch's choice]", show_default=False)
]
Weights = Annotated[str, typer.Option(help="A folder of weights, or the name of a shipped model.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit with its code. ``arguments`` are ``sys.argv[1:]`` unless given."""
    sys.exit(_run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    try:
        return app(arguments, prog_name="lumiere-fast", standalone_mode=False) or 0
    except _ClickException as error:
        return _refuse(error.format_message())  # type: ignore[attr-defined]
    except _REFUSALS as error:
        return _refuse(str(error))
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED


def _refuse(message: str) -> int:
    print(f"lumiere-fast: {' '.join(message.split())}", file=sys.stderr)
    return REFUSED


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to show, in a sentence.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file: .mp4, .gif or .png (contact sheet).")],
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    frames: Annotated[int | None, typer.Option(help="Frames, a multiple of the model's temporal factor.")] = None,
    fps: Annotated[int | None, typer.Option(min=1, help="Frames a second of the file.")] = None,
    backend: Backend = None,
    threads: Threads = None,
    weights: Weights = "demo",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")] = False,
    quiet: Quiet = False,
) -> None:
    """Make a video from a sentence. Options left out take the model's own values."""
    check_output(output, overwrite)
    settings = _given(num_frames=frames, num_inference_steps=steps, guidance_scale=guidance)
    with _threads(threads), _backend(backend):
        pipe = LumierePipeline.from_pretrained(weights)
        generator = torch.Generator().manual_seed(seed)
        result = pipe(prompt, generator=generator, progress=_shows_progress(quiet), **settings)
    fps = fps or pipe.default_fps
    started = time.perf_counter()
    write_video(result.frames[0], output, fps, overwrite)
    print(_summary(result, fps, time.perf_counter() - started, output))


def _summary(result: LumiereOutput, fps: int, writing: float, output: Path) -> str:
    _, _, frames, height, width = result.frames.shape
    seconds = ", ".join(f"{stage} {value:.1f} s" for stage, value in {**result.seconds, "writing": writing}.items())
    return f"{frames} frames of {width}x{height} at {fps} fps; {seconds}; backend {result.backend}; {output}"


@app.command()
def train(
    stage: Annotated[str, typer.Argument(help="t2i, ssr, or inflate, which adds time to a model that these trained.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The run's folder: log, checkpoint, averaged weights.")
    ],
    source: Annotated[
        Path | None, typer.Option("--from", help="For inflate: the folder of the image model.", show_default=False)
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images or clips a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0, help="Peak learning rate.")] = None,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Train one stage on procedural clips. Options left out take the stage's defaults."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    if device not in devices:
        raise ValueError(f"--device must be {' or '.join(devices)} on this machine, got {device!r}")
    with _threads(threads), _progress_bar("step", steps, shown=_shows_progress(quiet)) as bar:

        def on_log(step: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update(step - bar.n)

        training.train(
            stage,
            output,
            source=source,
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
            resume=resume,
            device=device,
            on_log=on_log,
        )
    print(f"trained {stage} into {output}")


@app.command()
def assemble(
    base: Annotated[Path, typer.Argument(help="Folder of the inflated text-to-image model.")],
    ssr: Annotated[Path, typer.Argument(help="Folder of the inflated super-resolution model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to make; --weights takes it.")],
) -> None:
    """Join two trained models into the weights of a pipeline, in fp16."""
    training.assemble(base, ssr, output)
    print(f"assembled {output}")


@app.command()
def evaluate(
    clips: Annotated[int, typer.Option(min=1, help="How many clips to make and score.")] = 200,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips made at a time.")] = 10,
    seed: Seed = EVALUATION_SEED,
    steps: Steps = None,
    guidance: Guidance = None,
    backend: Backend = None,
    threads: Threads = None,
    weights: Weights = "demo",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Quiet = False,
) -> None:
    """Score clips of held-out prompts with the tracker: how often each attribute is the one asked for."""
    settings = _given(num_inference_steps=steps, guidance_scale=guidance)
    with _threads(threads), _backend(backend), _progress_bar("clip", clips, shown=_shows_progress(quiet)) as bar:
        report = training.evaluate_pipeline(
            LumierePipeline.from_pretrained(weights),
            clips,
            batch_size=batch_size,
            seed=seed,
            on_batch=lambda done, _: bar.update(done - bar.n),
            **settings,
        )
    print(json.dumps(report, indent=2) if as_json else _score_table(report))


def _score_table(report: dict[str, dict[str, Any]]) -> str:
    """Accuracies with their 95% intervals, one column a stage; then the tracker's other means."""
    first = next(iter(report.values()))
    rows = [["right, with 95% interval", *report]]
    for name in first:
        if name != "quality":
            found = [report[stage][name] for stage in report]
            rows.append([name, *(f"{each['accuracy']:.3f} ({each['low']:.3f}-{each['high']:.3f})" for each in found)])
    rows.append(["mean over clips", *report])
    for name in first["quality"]:
        rows.append([name, *(f"{report[stage]['quality'][name]:.3f}" for stage in report)])
    return "\n".join("".join(cell.ljust(26) for cell in row).rstrip() for row in rows)


@app.command("info")
def show_info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Tell what is installed, and which backend can run each op, or why not."""
    info.main(["--json"] if as_json else [])


def _given(**settings: Any) -> dict[str, Any]:
    """The settings that are not None: what is left out keeps the pipeline's own default."""
    return {name: value for name, value in settings.items() if value is not None}


def _backend(name: str | None) -> AbstractContextManager[None]:
    return nullcontext() if name is None else dispatch.use_backend(name)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Within the block torch computes with this many threads; None leaves its choice."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _shows_progress(quiet: bool) -> bool:
    return sys.stderr.isatty() and not quiet


def _progress_bar(unit: str, total: int | None, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, disable=not shown)
