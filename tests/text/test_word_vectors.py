from __future__ import annotations

import builtins
import hashlib
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from itertools import combinations

import pytest
import torch
from torch import Tensor

from lumiere_fast.text import PromptWarning, TextEncoder, WordVectorEncoder, word_vectors
from tools.make_word_vectors import DROPPED_COMPONENTS, common_words, quantise_rows, reduce_embeddings

pytest.importorskip("tokenizers")

PROMPTS = ["a red ball moving left", "", "two unflappable crêpes, twirling!", "star"]


@pytest.fixture(scope="module")
def encoder() -> WordVectorEncoder:
    return WordVectorEncoder()


def vector(encoder: WordVectorEncoder, word: str) -> Tensor:
    """The mean vector of a word's pieces, its BOS token left out."""
    return encoder.encode(word).hidden_states[0, 1:].mean(dim=0)


def cosine(encoder: WordVectorEncoder, a: str, b: str) -> float:
    return torch.cosine_similarity(vector(encoder, a), vector(encoder, b), dim=0).item()


def test_shapes_dtypes_and_mask(encoder: WordVectorEncoder) -> None:
    hidden_states, mask = encoder.encode(PROMPTS)
    assert hidden_states.shape == (4, mask.shape[1], 64) and hidden_states.dtype == torch.float32
    assert mask.dtype == torch.bool
    # BOS + words; the third has rare words in pieces, so only a lower bound is known without the tokeniser.
    lengths = mask.sum(dim=1)
    assert lengths[[0, 1, 3]].tolist() == [6, 1, 2] and lengths[2] > 6
    assert lengths.max() == mask.shape[1]
    right_padded = torch.arange(mask.shape[1]) < lengths[:, None]
    assert torch.equal(mask, right_padded)
    assert not hidden_states[~mask].any()
    assert hidden_states[mask].abs().sum(dim=-1).min() > 0
    assert not hidden_states.requires_grad


def test_is_a_text_encoder(encoder: WordVectorEncoder) -> None:
    as_protocol: TextEncoder = encoder  # mypy checks the signatures
    assert (as_protocol.name, as_protocol.embed_dim, as_protocol.max_length) == ("word-vectors-v1", 64, 32)


def test_one_string_is_a_batch_of_one(encoder: WordVectorEncoder) -> None:
    single, listed = encoder.encode("a red ball"), encoder.encode(["a red ball"])
    assert single.hidden_states.shape == (1, 4, 64)
    assert torch.equal(single.hidden_states, listed.hidden_states) and torch.equal(single.mask, listed.mask)


def test_the_rest_of_the_batch_only_adds_padding(encoder: WordVectorEncoder) -> None:
    together = encoder.encode(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone = WordVectorEncoder().encode(prompt)
        length = alone.mask.shape[1]
        assert alone.mask.all()
        assert torch.equal(together.hidden_states[row, :length], alone.hidden_states[0])
        assert not together.mask[row, length:].any()


def test_deterministic_with_and_without_cached_tokens(encoder: WordVectorEncoder) -> None:
    word_vectors._tokenise.cache_clear()
    first = encoder.encode(PROMPTS)
    second = encoder.encode(PROMPTS)
    assert word_vectors._tokenise.cache_info().hits >= len(PROMPTS)
    assert torch.equal(first.hidden_states, second.hidden_states)


def test_results_do_not_alias_the_table(encoder: WordVectorEncoder) -> None:
    before = encoder.encode("red").hidden_states.clone()
    encoder.encode("red").hidden_states.zero_()
    assert torch.equal(encoder.encode("red").hidden_states, before)


def test_empty_prompt_is_the_token_every_prompt_starts_with(encoder: WordVectorEncoder) -> None:
    hidden_states, mask = encoder.encode(["", "  \n", "a blue star"])
    assert mask.sum(dim=1).tolist() == [1, 1, 4]
    assert torch.equal(hidden_states[0, 0], hidden_states[1, 0])
    assert torch.equal(hidden_states[0, 0], hidden_states[2, 0])
    assert hidden_states[0, 0].square().mean().sqrt() > 0.5


def test_case_and_accents_do_not_matter(encoder: WordVectorEncoder) -> None:
    assert torch.equal(encoder.encode("A Café").hidden_states, encoder.encode("a cafe").hidden_states)


def test_order_of_the_words_is_kept(encoder: WordVectorEncoder) -> None:
    a, b = encoder.encode("red ball").hidden_states[0], encoder.encode("ball red").hidden_states[0]
    assert torch.equal(a[[0, 2, 1]], b) and not torch.equal(a, b)


def test_special_tokens_cannot_be_typed(encoder: WordVectorEncoder) -> None:
    bos = encoder.encode("").hidden_states[0, 0]
    typed = encoder.encode("[CLS] ball").hidden_states[0, 1:]
    assert not (typed == bos).all(dim=-1).any()


def test_tokens_are_bert_word_pieces() -> None:
    """Ids published with BERT's uncased vocabulary: [CLS] a red ball em ##bed ##ding."""
    assert word_vectors._tokenise("a red ball embedding", 32).ids == (101, 1037, 2417, 3608, 7861, 8270, 4667)


def test_unknown_words_become_pieces_and_stay_apart(encoder: WordVectorEncoder) -> None:
    mask = encoder.encode("floofinator").mask
    assert mask.sum() > 2
    assert not torch.equal(vector(encoder, "floofinator"), vector(encoder, "zorbulation"))
    # A script outside the vocabulary is [UNK], still a real token.
    with pytest.warns(PromptWarning):
        assert encoder.encode("\U00013080").mask.tolist() == [[True, True]]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a \U0001f600 ball", ["\U0001f600"]),  # not in the vocabulary
        ("a красный мяч and a красный star", ["красный", "мяч"]),  # letter by letter in it, and once each
        ("a blueμ ball", ["blueμ"]),  # the word whole
        ("日本", ["日", "本"]),  # the tokeniser's words
        ("x" * 101, ["x" * 101]),  # longer than the tokeniser looks at
    ],
)
def test_unknown_words_are_named(encoder: WordVectorEncoder, prompt: str, words: list[str]) -> None:
    with pytest.warns(PromptWarning) as caught:
        encoder.encode(["a red ball", prompt])
    named = ", ".join(repr(word) for word in words)
    assert [str(each.message) for each in caught] == [
        f"prompt 1 has words that the text encoder does not know: {named}; they will not be followed"
    ]
    assert caught[0].filename == __file__


@pytest.mark.parametrize("prompt", ["", "a floofinator, co-op!", "Crêpes at 12:30 (½ off)", "naïve Straße", "2² — …"])
def test_latin_words_are_known_in_pieces_at_least(encoder: WordVectorEncoder, prompt: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode(prompt)


@pytest.mark.parametrize(
    ("word", "near", "far"),
    [
        ("spinning", "rotating", "table"),
        ("spinning", "rotating", "swinging"),
        ("crimson", "red", "blue"),
        ("azure", "blue", "red"),
        ("violet", "purple", "green"),
        ("grey", "gray", "red"),
        ("throbbing", "pulsing", "moving"),
        ("leaping", "bouncing", "still"),
        ("circling", "orbiting", "still"),
        ("upward", "up", "down"),
        ("rapidly", "quickly", "slowly"),
        ("sphere", "ball", "square"),
        ("disc", "circle", "square"),
        ("box", "square", "circle"),
    ],
)
def test_synonyms_are_near(encoder: WordVectorEncoder, word: str, near: str, far: str) -> None:
    assert cosine(encoder, word, near) > cosine(encoder, word, far)


@pytest.mark.parametrize(
    "group",
    [
        "red orange yellow green blue purple pink white black gray brown",
        "left right up down",
        "ball square triangle star heart ring circle",
        "moving still bouncing swinging orbiting pulsing",
        "quickly slowly",
    ],
)
def test_words_a_video_must_tell_apart_are_apart(encoder: WordVectorEncoder, group: str) -> None:
    for a, b in combinations(group.split(), 2):
        assert cosine(encoder, a, b) < 0.7, (a, b)


def test_exactly_max_length_tokens_is_not_truncated(encoder: WordVectorEncoder) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert encoder.encode("red " * 31).mask.shape == (1, 32)


def test_truncation_names_the_dropped_words_every_time(encoder: WordVectorEncoder) -> None:
    prompt = "red " * 31 + "Spinning quickly"
    for _ in range(2):
        with pytest.warns(PromptWarning, match=r"prompt 1 is longer than 32 tokens.*: 'Spinning quickly'"):
            truncated = encoder.encode(["", prompt])
    assert torch.equal(truncated.hidden_states[1], encoder.encode("red " * 31).hidden_states[0])


def test_truncation_inside_a_word_names_the_whole_word(encoder: WordVectorEncoder) -> None:
    with pytest.warns(PromptWarning, match=r": 'floofinator ball'"):
        encoder.encode("red " * 30 + "floofinator ball")


@pytest.mark.parametrize("prompts", [None, 3, b"red", ["red", None], [["red"]], ("red", b"blue"), {"red"}])
def test_what_is_no_string_is_refused(encoder: WordVectorEncoder, prompts: object) -> None:
    with pytest.raises(TypeError, match="prompts"):
        encoder.encode(prompts)  # type: ignore[arg-type]


def test_the_wrong_item_is_named(encoder: WordVectorEncoder) -> None:
    with pytest.raises(TypeError, match=r"prompts\[1\]: got 7 \(int\)"):
        encoder.encode(["red", 7])  # type: ignore[list-item]


def test_what_is_no_unicode_is_refused(encoder: WordVectorEncoder) -> None:
    """What a shell passes on that is not UTF-8."""
    for prompts, index in (("a \udcff ball", 0), (["red", "a \udcff ball"], 1)):
        with pytest.raises(
            ValueError, match=rf"prompts\[{index}\]: 'a \\udcff ball' is not valid Unicode: character 2"
        ):
            encoder.encode(prompts)


def test_no_prompts_are_refused(encoder: WordVectorEncoder) -> None:
    with pytest.raises(ValueError, match="at least one"):
        encoder.encode([])


def test_missing_tokenizers_says_what_to_install(encoder: WordVectorEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_tokenizers(
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] = (),
        level: int = 0,
    ) -> object:
        if name == "tokenizers":
            raise ImportError("not here")
        return real_import(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", without_tokenizers)
    with pytest.raises(ImportError, match="pip install tokenizers"):
        word_vectors._tokenizer.__wrapped__()


def test_import_needs_no_tokenizers() -> None:
    code = "import sys, lumiere_fast.text; sys.exit('tokenizers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_to_moves_the_result() -> None:
    encoder = WordVectorEncoder()
    assert encoder.to("meta") is encoder
    hidden_states, mask = encoder.encode(PROMPTS)
    assert hidden_states.device.type == mask.device.type == "meta"


def test_the_table_is_the_one_checkpoints_were_trained_with() -> None:
    """Another table is another encoder: give it another name, or every trained model reads noise."""
    table = (word_vectors.DATA_DIR / "word_vectors.safetensors").read_bytes()
    assert hashlib.sha256(table).hexdigest() == "81e5672e7d776442f5a7b8f61f4bcbb38b70cc72d69049ffd9d6c1b327f41068"
    assert WordVectorEncoder.name == "word-vectors-v1"


def test_shipped_files_are_small_and_no_pickles() -> None:
    sizes = {path.name: path.stat().st_size for path in word_vectors.DATA_DIR.iterdir()}
    assert set(sizes) == {"NOTICE", "vocab.txt", "word_vectors.safetensors"}
    assert sizes["word_vectors.safetensors"] < 2.1e6 and sizes["vocab.txt"] < 0.25e6


def test_table_has_unit_rms(encoder: WordVectorEncoder) -> None:
    assert encoder._table.shape == (30522, 64)
    assert encoder._table.square().mean().sqrt().item() == pytest.approx(1, abs=1e-3)


def test_quantised_rows_are_within_half_a_step() -> None:
    magnitudes = torch.logspace(-3, 3, 50, dtype=torch.float64)[:, None]
    table = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) * magnitudes
    vectors, scale = quantise_rows(table)
    assert vectors.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (50, 1)
    assert ((vectors * scale - table).abs() <= 0.501 * scale).all()
    assert (vectors.abs().amax(dim=1) == 127).all()


def test_projection_against_singular_vectors() -> None:
    """The recipe by SVD of the centred fit rows, less the first directions: x V s**(-1/2), up to signs and scale."""
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(300, 24, generator=generator).double() * torch.linspace(3, 0.3, 24)
    fit_ids = torch.randperm(300, generator=generator)[:200]
    reduced = reduce_embeddings(embeddings, fit_ids, dim=8)

    mean = embeddings[fit_ids].mean(dim=0)
    _, singular, directions = torch.linalg.svd(embeddings[fit_ids] - mean, full_matrices=False)
    kept = slice(DROPPED_COMPONENTS, DROPPED_COMPONENTS + 8)
    expected = (embeddings - mean) @ directions[kept].T / singular[kept].sqrt()
    expected *= (expected * reduced).sum(dim=0).sign()
    torch.testing.assert_close(reduced, expected / expected.square().mean().sqrt())


def test_projection_is_fitted_on_plain_words_only() -> None:
    words = (word_vectors.DATA_DIR / "vocab.txt").read_text(encoding="utf-8").split("\n")
    fitted = {words[i] for i in common_words(words).tolist()}
    assert {"red", "ball", "left"} <= fitted
    assert not fitted & {"[CLS]", "##ing", "1999", "zeppelin"}
