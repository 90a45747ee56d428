"""The command ``lumiere-fast``: generate, upscale, train, plot, assemble, evaluate, benchmark, tune, selftest, info.

Whatever a user can get wrong ends in one line on stderr and exit code 2, with nothing written; Ctrl-C ends in 130.
"""

from __future__ import annotations

import json
import re
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from lumiere_fast import benchmark, dispatch, info, selftest, training, tune
from lumiere_fast._malloc import keep_freed_memory
from lumiere_fast.diffusion import PREDICTION_TYPES, SAMPLERS
from lumiere_fast.models import PRESETS, Preset
from lumiere_fast.pipelines import Checkpoint, LumiereOutput, LumierePipeline
from lumiere_fast.text import PromptWarning, T5TextEncoder, TextEncoder
from lumiere_fast.text.encoder import as_prompts
from lumiere_fast.training.evaluation import EVALUATION_SEED
from lumiere_fast.video import MAX_FPS, Pixels, check_output, numbered_outputs, read_array, read_video, write_video

INTERRUPTED = 130  # what a shell reports for Ctrl-C
REFUSED = 2

SCORES = {"look": "colour, ground and shape", "all": "all four"}  # of the scorer's names those that need words
RESUME_SUFFIX = ".resume.safetensors"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Typer has click inside it or beside it, depending on its version. Either way this is the base of its usage errors.
_ClickException: type[Exception] = typer.BadParameter.__mro__[2]

# What bad input raises here and below; anything else is a defect of ours, and keeps its traceback.
_REFUSALS = (
    ValueError,
    OSError,
    ModuleNotFoundError,
    dispatch.BackendUnavailable,
    torch.OutOfMemoryError,
)

app = typer.Typer(
    help="Lumiere: text to video by a Space-Time U-Net.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _named(text: str) -> Path:
    """What --output names; a Path would make the current folder of nothing."""
    if not text:
        raise typer.BadParameter("it is empty; name what to make")
    return Path(text)


Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Equal seeds give equal results.")]
Steps = Annotated[int | None, typer.Option(min=1, max=10_000, help="Denoising steps of the base model.")]
Guidance = Annotated[float | None, typer.Option(min=0, help="Guidance scale; 1 turns guidance off.")]
Backend = Annotated[
    str | None, typer.Option(help=f"Force a backend: {', '.join(dispatch.BACKENDS)}; or {dispatch.AUTO}.")
]
Threads = Annotated[
    int | None, typer.Option(min=1, max=256, help="CPU threads.  [default: torch's choice]", show_default=False)
]
Weights = Annotated[str, typer.Option(help="A folder of weights, or the name of a shipped model.")]
TextEncoderFolder = Annotated[
    Path | None,
    typer.Option(
        "--text-encoder",
        help="A folder of T5, encoder and tokenizer.  [default: the embedded word vectors]",
        show_default=False,
    ),
]
Sampler = Annotated[
    str | None, typer.Option(help=f"{', '.join(SAMPLERS)}.  [default: dpm-solver++]", show_default=False)
]
BoundOfSteps = Annotated[
    str | None,
    typer.Option(help="Bound of each prediction: static, dynamic or none.  [default: static]", show_default=False),
]
Fps = Annotated[int | None, typer.Option(min=1, max=MAX_FPS, help="Frames a second of the file.")]
Dtype = Annotated[str, typer.Option(help=f"What the networks compute in: {', '.join(DTYPES)}.")]
WindowFrames = Annotated[
    int | None,
    typer.Option(
        help="Frames that super-resolution takes at a time.  [default: what the model was trained on]",
        show_default=False,
    ),
]
Overlap = Annotated[int | None, typer.Option(help="Frames that its windows share.  [default: 2]", show_default=False)]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        help="What super-resolution may take, such as 12GiB: its windows are chosen to fit.  [default: what is free]",
        show_default=False,
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help=f"Keep the state in OUTPUT{RESUME_SUFFIX} after every step; go on from it if it is there."
    ),
]
Offload = Annotated[
    bool, typer.Option("--offload", help="Keep each model on the CPU while it does not run: less memory on --device.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace outputs that exist.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit with its code. ``arguments`` are ``sys.argv[1:]`` unless given."""
    keep_freed_memory()
    sys.exit(_run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments:
        with redirect_stdout(sys.stderr):
            app(["--help"], prog_name="lumiere-fast", standalone_mode=False)
        return REFUSED
    try:
        with _warnings_as_lines():
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


@contextmanager
def _warnings_as_lines(subject: str | None = None) -> Iterator[None]:
    """Within the block a warning is one line on stderr, said once.

    Args:
        subject: what the prompts are called, in place of "prompt N" where N means nothing to the user.
    """
    said: set[str] = set()

    def show(message: Warning | str, *_: object) -> None:
        text = " ".join(str(message).split())
        if subject is not None:
            text = re.sub(r"^prompt \d+\b", subject, text)
        if text not in said:
            said.add(text)
            print(f"lumiere-fast: warning: {text}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]  # takes all of them, and needs one
        yield


@app.command()
def generate(
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            parser=_named,
            metavar="PATH",
            help="What to make: .mp4, .gif, .png (contact sheet), .npy (uint8 array), or a name without suffix for a "
            "folder of PNG frames. Clips of several prompts are numbered in front of the suffix, from _0000.",
        ),
    ],
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="What to show, in a sentence; a clip for each.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="More prompts, one a line, from a text file.", show_default=False)
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Of the first clip; the next ones count on from it.")
    ] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips made at a time.")] = 1,
    steps: Steps = None,
    guidance: Guidance = None,
    sampler: Sampler = None,
    threshold: BoundOfSteps = None,
    frames: Annotated[
        int | None, typer.Option(max=10**9, help="Frames, a multiple of the model's temporal factor.")
    ] = None,
    fps: Fps = None,
    window_frames: WindowFrames = None,
    overlap: Overlap = None,
    max_memory: MaxMemory = None,
    resume: Resume = False,
    offload: Offload = False,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    backend: Backend = None,
    threads: Threads = None,
    weights: Weights = "demo",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Make a video from each sentence. Options left out take the model's own values."""
    texts = _all_prompts(prompts or [], prompt_file)
    batches = _batches(numbered_outputs(output, len(texts)), batch_size, overwrite, resume)
    settings = _given(
        num_frames=frames,
        num_inference_steps=steps,
        guidance_scale=guidance,
        sampler=sampler,
        window_frames=window_frames,
        overlap=overlap,
        max_memory=max_memory,
    ) | _threshold(threshold)
    place = selftest.checked_device(device)
    with _threads(threads), _backend(backend), warnings.catch_warnings():
        pipe = _pipeline(weights, dtype, place, offload)
        warnings.simplefilter("always", PromptWarning)
        pipe.text_encoder.encode(texts)  # to be told which prompts will not reach the model whole,
        warnings.simplefilter("ignore", PromptWarning)  # of all of them, in their order, and once
        for first, outputs in batches:
            begun = _is_begun(outputs, resume)
            with _state_beside(outputs[0], resume) as state:
                result = pipe(
                    texts[first : first + len(outputs)],
                    generator=_generators(seed + first, len(outputs)),
                    progress=_shows_progress(quiet),
                    **settings,
                    **state,
                )
                length = window_frames or pipe.config.window_frames
                _write(result, outputs, fps or pipe.default_fps, overwrite or begun, length)


@app.command()
def upscale(
    source: Annotated[
        Path, typer.Argument(metavar="INPUT", help="A video of any length and size, or an .npy as generate writes it.")
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            parser=_named,
            metavar="PATH",
            help="What to make: .mp4, .gif, .png (contact sheet), .npy (uint8 array), or a name without suffix for a "
            "folder of PNG frames.",
        ),
    ],
    prompt: Annotated[str, typer.Option(help="What it shows, in a sentence.")],
    seed: Seed = 0,
    steps: Annotated[int | None, typer.Option(min=1, max=10_000, help="Denoising steps of each window.")] = None,
    sampler: Sampler = None,
    threshold: BoundOfSteps = None,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Only so many from the start.  [default: all]", show_default=False)
    ] = None,
    fps: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MAX_FPS,
            help="Of the file made.  [default: those of INPUT; of an .npy the model's]",
            show_default=False,
        ),
    ] = None,
    window_frames: WindowFrames = None,
    overlap: Overlap = None,
    max_memory: MaxMemory = None,
    resume: Resume = False,
    offload: Offload = False,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    backend: Backend = None,
    threads: Threads = None,
    weights: Weights = "demo",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Raise the height and width of a video by super-resolution alone. Options left out take the model's own values."""
    (text,) = _all_prompts([prompt], None)
    overwrite = overwrite or _is_begun([output], resume)
    check_output(output, overwrite)
    settings = _given(
        num_inference_steps=steps,
        sampler=sampler,
        window_frames=window_frames,
        overlap=overlap,
        max_memory=max_memory,
    ) | _threshold(threshold)
    place = selftest.checked_device(device)
    clip, rate = _read(source, frames)
    with _threads(threads), _backend(backend), _state_beside(output, resume) as state:
        pipe = _pipeline(weights, dtype, place, offload)
        result = pipe.upscale(
            clip, text, generator=_generators(seed, 1), progress=_shows_progress(quiet), **settings, **state
        )
        rate = fps or rate or pipe.default_fps
        _write(result, [output], rate, overwrite, window_frames or pipe.config.window_frames)


def _read(source: Path, frames: int | None) -> tuple[Pixels, float | None]:
    """A video's pixels and frames a second, which an array does not tell."""
    if not source.is_file():
        raise FileNotFoundError(f"INPUT {str(source)!r} is not a file")
    if source.suffix.lower() == ".npy":
        return read_array(source, frames), None
    if find_spec("av") is None:
        raise ModuleNotFoundError("reading a video needs av, which is not installed: pip install av", name="av")
    try:
        return read_video(source, frames)
    except (ValueError, OSError) as error:
        raise ValueError(f"INPUT {str(source)!r} is not a video that can be read: {error}") from error


def _pipeline(weights: str, dtype: str, place: torch.device, offload: bool) -> LumierePipeline:
    pipe = LumierePipeline.from_pretrained(weights, torch_dtype=_dtype(dtype))
    if not offload:
        return pipe.to(place)
    pipe.enable_model_cpu_offload(place)
    return pipe


def _threshold(name: str | None) -> dict[str, Any]:
    return {} if name is None else {"threshold": None if name == "none" else name}


def _batches(outputs: list[Path], size: int, overwrite: bool, resume: bool) -> list[tuple[int, list[Path]]]:
    """The outputs of each batch and the number of its first, checked.

    With `resume` batches that an interrupted command finished are left out, and named, unless all are there: then
    nothing was interrupted, and they are refused as any output that exists.
    """
    batches = [(first, outputs[first : first + size]) for first in range(0, len(outputs), size)]
    if resume and not overwrite:
        unfinished = [b for b in batches if not all(path.exists() for path in b[1]) or _is_begun(b[1], resume)]
        for _, batch in batches:
            if unfinished and batch not in [outputs for _, outputs in unfinished]:
                print(f"kept as they are: {', '.join(map(str, batch))}")
        batches = unfinished or batches
    for _, batch in batches:
        for path in batch:
            check_output(path, overwrite or _is_begun(batch, resume))
    return batches


def _state_path(output: Path) -> Path:
    return output.with_name(output.name + RESUME_SUFFIX)


def _is_begun(outputs: list[Path], resume: bool) -> bool:
    """Whether an interrupted command left the state of this batch: then what is there of its outputs is that command's,
    which had found none."""
    return resume and _state_path(outputs[0]).exists()


@contextmanager
def _state_beside(output: Path, resume: bool) -> Iterator[dict[str, Any]]:
    """With `resume` the setting that has a pipeline keep its state beside `output`, removed when the block is done."""
    if not resume:
        yield {}
        return
    path = _state_path(output)
    try:
        yield {"checkpoint": Checkpoint(path, keep=True)}
    except KeyboardInterrupt:
        if path.exists():
            print(f"lumiere-fast: interrupted; the same command goes on from {path}", file=sys.stderr)
        raise
    path.unlink(missing_ok=True)


def _all_prompts(prompts: list[str], file: Path | None) -> list[str]:
    """The prompts of the command line, then those of the file, one a line, blank lines left out."""
    if file is not None:
        if not file.is_file():
            raise FileNotFoundError(f"--prompt-file {str(file)!r} is not a file")
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompt-file {str(file)!r} is not text in UTF-8: {error}") from error
        prompts = prompts + [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError('no prompt: give a sentence, such as "a red ball moving left", or more with --prompt-file')
    for index, prompt in enumerate(prompts):
        if not prompt.strip():
            raise ValueError(f'prompt {index} is empty: say what to show, such as "a red ball moving left"')
    return as_prompts(prompts)


def _generators(seed: int, count: int) -> list[torch.Generator]:
    """One a clip, so that a clip is that of its prompt and its seed, whatever it is made together with."""
    return [torch.Generator().manual_seed(seed + index) for index in range(count)]


def _write(result: LumiereOutput, outputs: list[Path], fps: float, overwrite: bool, window_frames: int) -> None:
    started = time.perf_counter()
    for clip, output in zip(result.frames, outputs, strict=True):
        write_video(clip, output, fps, overwrite)
    print(_summary(result, fps, time.perf_counter() - started, outputs, window_frames))


def _summary(result: LumiereOutput, fps: float, writing: float, outputs: list[Path], window_frames: int) -> str:
    """What was made and how, with the windows where memory made them shorter than `window_frames`."""
    _, _, frames, height, width = result.frames.shape
    seconds = ", ".join(f"{stage} {value:.1f} s" for stage, value in {**result.seconds, "writing": writing}.items())
    names = ", ".join(map(str, outputs))
    plan = result.windows["ssr"]
    shorter = f"ssr in {plan}; " if plan.window_frames < min(window_frames, plan.num_frames) else ""
    return f"{frames} frames of {width}x{height} at {fps:g} fps; {seconds}; {shorter}backend {result.backend}; {names}"


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"--dtype must be {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


@app.command()
def train(
    stage: Annotated[str, typer.Argument(help="t2i, ssr, or inflate, which adds time to a model that these trained.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            parser=_named,
            metavar="PATH",
            help="The run's folder: log, checkpoint, averaged weights.",
        ),
    ],
    source: Annotated[
        Path | None, typer.Option("--from", help="For inflate: the folder of the image model.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A folder of videos and pictures: captions in name.txt beside each, or one metadata.jsonl or .csv "
            "with file_name and text.  [default: procedural clips]",
            show_default=False,
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help=f"Model shapes, frames and fps: {', '.join(PRESETS)}.", show_default=False)
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="The same from a JSON file such as a run's cascade.json.", show_default=False),
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(help=f"Noise schedule: {', '.join(training.SCHEDULE_NAMES)}.", show_default=False)
    ] = None,
    prediction_type: Annotated[
        str | None,
        typer.Option(help=f"What the network predicts: {', '.join(PREDICTION_TYPES)}.", show_default=False),
    ] = None,
    text_encoder: TextEncoderFolder = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images or clips at a time.")] = None,
    gradient_accumulation_steps: Annotated[int, typer.Option(min=1, help="Batches that make one step.")] = 1,
    learning_rate: Annotated[float | None, typer.Option(min=0, help="Peak learning rate.")] = None,
    precision: Annotated[str, typer.Option(help="fp32, or bf16 for autocast.")] = "fp32",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time, the same result.")
    ] = False,
    crop: Annotated[str, typer.Option(help="Which square of a --data video: center or random.")] = "center",
    skip_short: Annotated[bool, typer.Option("--skip-short", help="Leave out --data videos that are short.")] = False,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")] = False,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 200,
    device: Device = "cpu",
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Train one stage on procedural clips or your own. Options left out take those of --from, or the defaults."""
    place = selftest.checked_device(device)
    cascade = _cascade(preset, config)
    bar_of_steps = _progress_bar("step", steps, shown=_shows_progress(quiet))
    with _threads(threads), _warnings_as_lines("a caption"), bar_of_steps as bar:

        def on_log(step: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update(step - bar.n)

        training.train(
            stage,
            output,
            source=source,
            data=data,
            cascade=cascade,
            schedule=schedule,
            prediction_type=prediction_type,
            text_encoder=_text_encoder(text_encoder),
            steps=steps,
            batch_size=batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            learning_rate=learning_rate,
            precision=precision,  # type: ignore[arg-type]  # checked there
            gradient_checkpointing=gradient_checkpointing,
            crop=crop,  # type: ignore[arg-type]  # checked there
            short_clips="skip" if skip_short else "refuse",
            seed=seed,
            resume=resume,
            device=str(place),
            checkpoint_every=checkpoint_every,
            on_log=on_log,
        )
    print(f"trained {stage} into {output}")


def _text_encoder(folder: Path | None) -> TextEncoder | None:
    return None if folder is None else T5TextEncoder.from_pretrained(folder)


def _cascade(preset: str | None, config: Path | None) -> Preset | None:
    """The cascade that --preset or --config names; None leaves it to the stage."""
    if preset is not None and config is not None:
        raise ValueError("--preset and --config both name model shapes; give one of them")
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    if config is not None:
        return training.read_cascade(config)
    return None if preset is None else PRESETS[preset]


@app.command("plot")
def plot_loss(run: Annotated[Path, typer.Argument(help="The folder of a training run.")]) -> None:
    """Draw the log of a run, finished or not, into its loss.png."""
    print(training.draw_loss_curve(run))


@app.command()
def assemble(
    base: Annotated[Path, typer.Argument(help="Folder of the inflated text-to-image model.")],
    ssr: Annotated[Path, typer.Argument(help="Folder of the inflated super-resolution model.")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", parser=_named, metavar="PATH", help="The folder to make; --weights takes it."),
    ],
    dtype: Annotated[str, typer.Option(help=f"Of the weights on disk: {', '.join(DTYPES)}.")] = "float16",
    text_encoder: TextEncoderFolder = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the pipeline in that folder.")] = False,
) -> None:
    """Join two trained models into the folder of a pipeline."""
    encoder = _text_encoder(text_encoder)
    training.assemble(base, ssr, output, dtype=_dtype(dtype), text_encoder=encoder, overwrite=overwrite)
    print(f"assembled {output}")


@app.command()
def evaluate(
    clips: Annotated[int, typer.Option(min=1, help="How many clips to make and score.")] = 200,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips made at a time.")] = 10,
    seed: Seed = EVALUATION_SEED,
    steps: Steps = None,
    guidance: Guidance = None,
    device: Device = "cpu",
    backend: Backend = None,
    threads: Threads = None,
    weights: Weights = "demo",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Quiet = False,
) -> None:
    """Score clips of held-out prompts with the tracker: how often each attribute is the one asked for."""
    settings = _given(num_inference_steps=steps, guidance_scale=guidance)
    place = selftest.checked_device(device)
    with _threads(threads), _backend(backend), _progress_bar("clip", clips, shown=_shows_progress(quiet)) as bar:
        report = training.evaluate_pipeline(
            LumierePipeline.from_pretrained(weights).to(place),
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
            label = SCORES.get(name, name)
            rows.append([label, *(f"{each['accuracy']:.3f} ({each['low']:.3f}-{each['high']:.3f})" for each in found)])
    rows.append(["mean over clips", *report])
    for name in first["quality"]:
        rows.append([name, *(f"{report[stage]['quality'][name]:.3f}" for stage in report)])
    return "\n".join("".join(cell.ljust(26) for cell in row).rstrip() for row in rows)


@app.command("benchmark")
def run_benchmark(
    op: Annotated[list[str] | None, typer.Option("--op", help="An op, stunet or pipeline; repeat it for more.")] = None,
    backend: Backend = None,
    threads: Threads = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda.  [default: cuda if there is one]", show_default=False)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(benchmark.DTYPES)}.  [default: bfloat16 on a GPU]", show_default=False),
    ] = None,
    budget: Annotated[float, typer.Option(min=0.001, help="Seconds of timed rounds a row.")] = 0.3,
    weights: Weights = "demo",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time the pipeline, its models and each op: the backend that is used against the reference, in turn."""
    settings = _given(backend=backend, device=device, dtype=dtype, budget=budget, weights=weights)
    with _threads(threads):
        rows = list(benchmark.run(op, **settings))
    if all(row.why_not for row in rows):
        raise dispatch.BackendUnavailable("; ".join(dict.fromkeys(reason for row in rows for reason in row.why_not)))
    print(json.dumps([asdict(row) for row in rows], indent=2) if as_json else benchmark.render(rows))


@app.command("tune")
def run_tune(
    op: Annotated[list[str] | None, typer.Option("--op", help="An op with configurations; repeat it for more.")] = None,
    case: Annotated[
        list[str] | None, typer.Option("--case", help="A case, tuned again if the table has it; repeat it for more.")
    ] = None,
    budget: Annotated[float, typer.Option(min=0.001, help="Seconds; what is left then, the next run does.")] = (
        tune.BUDGET
    ),
    out: Annotated[
        Path | None,
        typer.Option(parser=_named, metavar="FILE", help="The table.  [default: the user's own]", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Quiet = False,
) -> None:
    """Find the fastest configuration of each kernel's cases on this GPU. Exit code 1 if one has none that is right."""
    rows = []
    for row in tune.run(op or None, case or None, budget=budget, out=out):
        rows.append(row)
        if _shows_progress(quiet):
            print(f"{row.op}, {row.case}: {row.status} in {row.seconds:.0f} s", file=sys.stderr)
    print(json.dumps([asdict(row) for row in rows], indent=2) if as_json else tune.render(rows))
    raise typer.Exit(int(any(row.status == "failed" for row in rows)))


@app.command("selftest")
def run_selftest(
    op: Annotated[list[str] | None, typer.Argument(help="Ops to check; all if none is named.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N.  [default: the GPU if there is one]", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Hold every kernel that can run here against its reference. Exit code 1 if one is wrong."""
    options = [*(["--device", device] if device else []), *(["--json"] if as_json else [])]
    raise typer.Exit(selftest.main([*(op or []), *options]))


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


if __name__ == "__main__":
    main()
