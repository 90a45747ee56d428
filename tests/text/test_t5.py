"""T5 through transformers: a tiny encoder with random weights and a tokeniser trained here, alone and in a cascade."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lumiere_fast import InflationConfig, LumierePipeline, UNetConfig
from lumiere_fast.models import Preset
from lumiere_fast.text import PromptWarning, T5TextEncoder, TextEncoder, t5
from tests.pipelines.tiny import make_pipeline

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WIDTH = 20
CAPTIONS = ["a red ball moving left", "a blue star going up and down", "two green rings spinning quickly"]
EOS = 1


def tiny_tokenizer() -> Any:
    """T5's kind: Unigram over words with their space as an underscore, `</s>` as token 1."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=80, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CAPTIONS * 20, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    )


def tiny_encoder(**settings: Any) -> T5TextEncoder:
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=96, d_model=WIDTH, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    return T5TextEncoder(transformers.T5EncoderModel(config), tiny_tokenizer(), **settings)


@pytest.fixture(scope="module")
def encoder() -> T5TextEncoder:
    return tiny_encoder()


@pytest.fixture(scope="module")
def saved(encoder: T5TextEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5") / "tiny"
    encoder.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved encoder, to damage."""
    return Path(shutil.copytree(saved, tmp_path / "t5"))


def same(a: T5TextEncoder, b: T5TextEncoder) -> bool:
    mine, theirs = a.encode([*CAPTIONS, ""]), b.encode([*CAPTIONS, ""])
    return torch.equal(mine.hidden_states, theirs.hidden_states) and torch.equal(mine.mask, theirs.mask)


# The protocol --------------------------------------------------------------------------------------------------------


def test_is_a_text_encoder(encoder: T5TextEncoder) -> None:
    as_protocol: TextEncoder = encoder  # mypy checks the signatures
    assert (as_protocol.name, as_protocol.embed_dim, as_protocol.max_length) == ("t5-2x20", WIDTH, 128)


def test_states_are_those_of_transformers(encoder: T5TextEncoder) -> None:
    """Each prompt alone, without padding, with the `</s>` that T5 was trained to see."""
    hidden_states, mask = encoder.encode([*CAPTIONS, ""])
    assert hidden_states.shape == (4, mask.shape[1], WIDTH)
    assert (hidden_states.dtype, mask.dtype) == (torch.float32, torch.bool)
    for row, prompt in enumerate([*CAPTIONS, ""]):
        ids = encoder.tokenizer(prompt, add_special_tokens=False)["input_ids"] + [EOS]
        with torch.no_grad():
            expected = encoder.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        assert mask[row].tolist() == [True] * len(ids) + [False] * (mask.shape[1] - len(ids))  # padded on the right
        torch.testing.assert_close(hidden_states[row, : len(ids)], expected, rtol=0, atol=1e-5)
        assert not hidden_states[row, len(ids) :].any()
    assert mask[3].sum() == 1  # "" is one token


def test_one_string_is_a_batch_of_one(encoder: T5TextEncoder) -> None:
    single, listed = encoder.encode(CAPTIONS[0]), encoder.encode(CAPTIONS[:1])
    assert single.hidden_states.shape[0] == 1
    assert torch.equal(single.hidden_states, listed.hidden_states)


def test_it_is_frozen_and_deterministic() -> None:
    encoder = tiny_encoder()
    encoder.model.train()  # as a careless caller may: dropout is 0.1
    again = T5TextEncoder(encoder.model, encoder.tokenizer)
    assert not any(p.requires_grad for p in again.model.parameters())
    assert not again.encode("a red ball").hidden_states.requires_grad
    assert same(again, again)


def test_half_precision_weights_give_float32_states(folder: Path, encoder: T5TextEncoder) -> None:
    half = T5TextEncoder.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16
    states, expected = half.encode(CAPTIONS).hidden_states, encoder.encode(CAPTIONS).hidden_states
    assert states.dtype == torch.float32
    assert 0 < (states - expected).abs().max() < 0.1 * expected.abs().max()


def test_to_moves_the_result() -> None:
    encoder = tiny_encoder()
    assert encoder.to("meta") is encoder
    assert encoder.model.device.type == "meta"
    seen: list[str] = []

    def stop(module: Any, args: Any, inputs: dict[str, Tensor]) -> None:  # transformers cannot compute there
        seen.extend(inputs[name].device.type for name in ("input_ids", "attention_mask"))
        raise InterruptedError

    encoder.model.register_forward_pre_hook(stop, with_kwargs=True)
    with pytest.raises(InterruptedError):
        encoder.encode(CAPTIONS)
    assert seen == ["meta", "meta"]


@pytest.mark.parametrize("prompts", [None, 3, b"red", ["red", None], {"red"}])
def test_what_is_no_string_is_refused(encoder: T5TextEncoder, prompts: Any) -> None:
    with pytest.raises(TypeError, match="prompts"):
        encoder.encode(prompts)


def test_what_is_no_unicode_is_refused(encoder: T5TextEncoder) -> None:
    with pytest.raises(ValueError, match=r"prompts\[0\]: '\\udcff ball' is not valid Unicode: character 0"):
        encoder.encode("\udcff ball")


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_a_full_disk_is_an_os_error_that_names_the_folder(tmp_path: Path, part: str) -> None:
    def fails(*_: object, **__: object) -> None:
        raise SafetensorError("No space left") if part == "model" else Exception("No space left")

    encoder = tiny_encoder()
    setattr(getattr(encoder, part), "save_pretrained", fails)  # noqa: B010
    with pytest.raises(OSError, match=rf"{tmp_path / part} could not be written: No space left"):
        encoder.save_pretrained(tmp_path / "model", tmp_path / "tokenizer")


def test_no_prompts_are_refused(encoder: T5TextEncoder) -> None:
    with pytest.raises(ValueError, match="at least one"):
        encoder.encode([])


# What does not reach the model ---------------------------------------------------------------------------------------


def test_truncation_names_the_dropped_words_and_keeps_the_end_token() -> None:
    encoder = tiny_encoder()
    whole = encoder._tokenise("a red ball").ids
    short = T5TextEncoder(encoder.model, encoder.tokenizer, max_length=len(whole))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert short.encode("a red ball").mask.shape == (1, len(whole))  # exactly at the limit
    message = rf"prompt 1 is longer than {len(whole)} tokens; dropped from its end: 'moving left'"
    with pytest.warns(PromptWarning, match=message) as caught:
        states, mask = short.encode(["", "a red ball moving left"])
    assert caught[0].filename == __file__
    assert mask.shape == (2, len(whole))
    torch.testing.assert_close(states[1], short.encode("a red ball").hidden_states[0], rtol=0, atol=1e-5)


def test_a_word_cut_in_its_middle_is_named_whole() -> None:
    encoder = tiny_encoder()
    pieces = encoder._tokenise("a spinning").ids
    cut = T5TextEncoder(encoder.model, encoder.tokenizer, max_length=len(pieces) - 1)
    with pytest.warns(PromptWarning, match=": 'spinning quickly'"):
        cut.encode("a spinning quickly")


def test_unknown_words_are_named_once(encoder: T5TextEncoder) -> None:
    with pytest.warns(PromptWarning, match=r"prompt 1 has words that the text encoder does not know: '日本', 'ё';"):
        encoder.encode(["a red ball", "a 日本 ball and 日本 ё"])


def test_the_length_is_the_tokenizers_where_that_is_less() -> None:
    encoder = tiny_encoder()
    encoder.tokenizer.model_max_length = 7
    assert T5TextEncoder(encoder.model, encoder.tokenizer).max_length == 7
    assert T5TextEncoder(encoder.model, encoder.tokenizer, max_length=300).max_length == 300
    with pytest.raises(ValueError, match="max_length must be >= 1, got 0"):
        T5TextEncoder(encoder.model, encoder.tokenizer, max_length=0)


def test_model_and_tokenizer_must_be_a_pair(encoder: T5TextEncoder) -> None:
    config = transformers.T5Config(vocab_size=10, d_model=WIDTH, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ tokens, the model 10: not a pair"):
        T5TextEncoder(transformers.T5EncoderModel(config), tiny_tokenizer())
    endless = tiny_tokenizer()
    endless.eos_token = None
    with pytest.raises(ValueError, match="with an eos_token"):
        T5TextEncoder(encoder.model, endless)


# Folders -------------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded_in_one_folder_or_two(
    encoder: T5TextEncoder, saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    encoder.save_pretrained(tmp_path / "text_encoder", tmp_path / "tokenizer", max_shard_size="5KB")
    assert len(list((tmp_path / "text_encoder").glob("*.safetensors"))) > 1
    assert not list((tmp_path / "text_encoder").glob("tokenizer*"))
    assert same(T5TextEncoder.from_pretrained(tmp_path / "text_encoder", tmp_path / "tokenizer"), encoder)
    assert same(T5TextEncoder.from_pretrained(str(saved)), encoder)
    assert capfd.readouterr() == ("", "")  # no bars, no reports
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        encoder.save_pretrained(tmp_path / "elsewhere", tmp_path / "tokenizer")
    assert not (tmp_path / "elsewhere").exists()


def test_the_encoder_of_a_whole_t5_is_taken(encoder: T5TextEncoder, folder: Path) -> None:
    whole = transformers.T5ForConditionalGeneration(encoder.model.config)
    whole.encoder.load_state_dict(encoder.model.encoder.state_dict())
    whole.shared.weight.data.copy_(encoder.model.shared.weight)
    (folder / "model.safetensors").unlink()
    whole.save_pretrained(folder)
    assert any(name.startswith("decoder.") for name in load_file(folder / "model.safetensors"))
    assert same(T5TextEncoder.from_pretrained(folder), encoder)


def test_a_sentencepiece_vocabulary_alone_is_read(encoder: T5TextEncoder, folder: Path, tmp_path: Path) -> None:
    """As in the folders of t5-v1_1: `spiece.model`, and no tokenizer.json."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "captions.txt"),
        model_prefix=str(folder / "spiece"),
        vocab_size=30,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "tokenizer.json").unlink()
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 4, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = T5TextEncoder.from_pretrained(folder)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    assert loaded._tokenise("a red ball").ids == (*processor.encode("a red ball"), EOS)


def drop(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def reshape(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, name: torch.zeros(3, 5)}, folder / "model.safetensors", metadata={"format": "pt"})


def to_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def to_pickle_beside_an_adapter(folder: Path) -> None:
    to_pickle(folder)
    save_file({"lora": torch.zeros(1)}, folder / "adapter.safetensors", metadata={"format": "pt"})


QUERY = "encoder.block.1.layer.0.SelfAttention.q.weight"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (shutil.rmtree, FileNotFoundError, "is not a folder; give one on this machine"),
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, r"config\.json is missing: not a T5 folder"),
        (lambda f: (f / "config.json").write_text("{"), ValueError, "t5: transformers cannot load this.*JSON"),
        (
            lambda f: (f / "config.json").write_text('{"model_type": "bert"}'),
            ValueError,
            "cannot load this as a T5 encoder: it holds a model of type 'bert'",
        ),
        (lambda f: drop(f, QUERY), ValueError, f"its weights lack '{QUERY}'"),
        (lambda f: reshape(f, QUERY), ValueError, f"its weights lack '{QUERY}'"),
        (lambda f: (f / "model.safetensors").write_bytes(b"123"), ValueError, "t5: transformers cannot load this"),
        (lambda f: (f / "model.safetensors").unlink(), ValueError, r"has no weights: model\.safetensors is needed"),
        (to_pickle, ValueError, r"has only pytorch_model\.bin, a pickle, .* convert it: python -c"),
        (to_pickle_beside_an_adapter, ValueError, "t5: transformers cannot load this"),
        (lambda f: (f / "tokenizer.json").write_text("{"), ValueError, "t5: transformers cannot load this"),
    ],
)
def test_a_damaged_folder_is_told(
    folder: Path, damage: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    damage(folder)
    with pytest.raises(error, match=message):
        T5TextEncoder.from_pretrained(folder)


def test_the_command_that_converts_a_pickle_does(encoder: T5TextEncoder, folder: Path) -> None:
    to_pickle(folder)
    with pytest.raises(ValueError, match="convert it") as refused:
        T5TextEncoder.from_pretrained(folder)
    command = str(refused.value).partition('python -c "')[2].rpartition('"')[0]
    subprocess.run([sys.executable, "-c", command], cwd=folder, check=True, capture_output=True)
    assert same(T5TextEncoder.from_pretrained(folder / "converted", folder), encoder)


def test_missing_transformers_says_what_to_install(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install lumiere_fast\[t5\]"):
        T5TextEncoder.from_pretrained(saved)


def test_import_needs_no_transformers() -> None:
    code = "import sys, lumiere_fast.text.t5; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_progress_bars_of_transformers_are_given_back(saved: Path) -> None:
    logging = transformers.utils.logging
    logging.enable_progress_bar()
    level = logging.get_verbosity()
    with t5._quiet(transformers):
        assert not logging.is_progress_bar_enabled()
    assert logging.is_progress_bar_enabled()
    assert logging.get_verbosity() == level


# In a cascade --------------------------------------------------------------------------------------------------------


def clip(pipe: LumierePipeline, prompt: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    output = pipe(prompt, num_inference_steps=2, ssr_num_inference_steps=2, generator=generator)
    frames: Tensor = output.frames
    return frames


def test_a_cascade_reads_it_is_saved_with_it_and_loaded_equal(tmp_path: Path) -> None:
    pipe = make_pipeline(text_encoder=tiny_encoder(max_length=40))
    first = clip(pipe, CAPTIONS[0])
    assert first.shape == (1, 3, 4, 16, 16)
    assert (first - clip(pipe, CAPTIONS[1])).abs().mean() > 1e-3  # the text is read

    pipe.save_pretrained(tmp_path / "pipe", dtype=torch.float32)
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["text_encoder"] == ["transformers", "T5EncoderModel"]
    assert index["tokenizer"][0] == "transformers"
    loaded = LumierePipeline.from_pretrained(tmp_path / "pipe")
    assert isinstance(loaded.text_encoder, T5TextEncoder)
    assert loaded.text_encoder.max_length == 40
    assert torch.equal(clip(loaded, CAPTIONS[0]), first)
    # Each component is what its library reads by itself.
    theirs = transformers.T5EncoderModel.from_pretrained(tmp_path / "pipe" / "text_encoder", local_files_only=True)
    assert torch.equal(theirs.shared.weight, pipe.text_encoder.model.shared.weight)  # type: ignore[attr-defined]


def test_a_cascade_with_it_is_replaced_by_one_without(tmp_path: Path) -> None:
    make_pipeline(text_encoder=tiny_encoder()).save_pretrained(tmp_path)
    plain = make_pipeline()
    plain.save_pretrained(tmp_path, overwrite=True)
    assert not (tmp_path / "tokenizer").exists()
    assert sorted(path.name for path in (tmp_path / "text_encoder").iterdir()) == ["config.json"]
    assert torch.equal(clip(LumierePipeline.from_pretrained(tmp_path), CAPTIONS[0]), clip(plain, CAPTIONS[0]))


def test_half_precision_is_the_encoders_too(tmp_path: Path) -> None:
    make_pipeline(text_encoder=tiny_encoder()).save_pretrained(tmp_path)
    loaded = LumierePipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert isinstance(loaded.text_encoder, T5TextEncoder)
    assert loaded.text_encoder.model.dtype == loaded.dtype == torch.bfloat16
    assert clip(loaded, CAPTIONS[0]).isfinite().all()


# From the command line -----------------------------------------------------------------------------------------------


def test_a_cascade_that_reads_t5_is_trained_joined_and_used_by_commands(saved: Path, tmp_path: Path) -> None:
    unet = {
        "block_out_channels": (8, 16),
        "layers_per_block": (1, 1),
        "attention_levels": (1,),
        "attention_head_dim": 8,
        "norm_num_groups": 4,
        "text_embed_dim": WIDTH,
        "text_width": 16,
        "text_layers": 1,
        "time_embed_dim": 16,
    }
    inflation = InflationConfig(temporal_factors=(2,), text_layers=1)
    ssr = UNetConfig(sample_size=16, conditioning_channels=3, noise_augmentation=True, **unet)
    base = UNetConfig(sample_size=8, **unet)
    cascade = Preset(base, inflation, ssr, inflation, num_frames=4, fps=8, window_frames=4)
    config = tmp_path / "cascade.json"
    config.write_text(json.dumps(dataclasses.asdict(cascade)))

    cli = pytest.importorskip("lumiere_fast.cli")

    def command(*arguments: object) -> None:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        assert not ended.value.code

    few = ("--steps", 1, "--batch-size", 1, "--text-encoder", saved)
    for stage, out, options in (
        ("t2i", "image", ("--config", config)),
        ("inflate", "base", ("--from", tmp_path / "image")),
        ("ssr", "large", ("--config", config)),
        ("inflate", "ssr", ("--from", tmp_path / "large")),
    ):
        command("train", stage, "-o", tmp_path / out, *options, *few)
    joined = tmp_path / "joined"
    command("assemble", tmp_path / "base", tmp_path / "ssr", "-o", joined, "--text-encoder", saved)
    clip = tmp_path / "clip.npy"
    command("generate", CAPTIONS[0], "-o", clip, "--weights", joined, "--steps", 1, "--quiet")
    assert np.load(clip).shape == (4, 16, 16, 3)
