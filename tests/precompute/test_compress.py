"""`pca` and `int8`: what they lose is what is reported, and readers see the teacher's channels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hpc_neuro import precompute
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.data.feature_cache import CODING, MANIFEST, FeatureCache, encoding
from hpc_neuro.precompute import cache_tool
from tests.precompute.conftest import Configure

BOX, PATCH = Box((0, 0, 0), (16, 48, 48)), (8, 16, 16)


def low_rank(tokens: int, seed: int) -> torch.Tensor:
    """[2, tokens, 10] that lie near a plane of 3 dimensions."""
    draw = np.random.default_rng(seed)
    basis = np.random.default_rng(0).normal(size=(2, 3, 10))
    return torch.from_numpy(
        draw.normal(size=(2, tokens, 3)) @ basis + 0.01 * draw.normal(size=(2, tokens, 10)) + 5
    ).float()


def test_pca_is_the_truncated_singular_value_decomposition() -> None:
    seen, unseen = low_rank(400, 1), low_rank(300, 2)
    coding, quality = encoding.fit_coding(seen, unseen, 2, False)
    for layer in range(2):
        mean = seen[layer].numpy().mean(0)
        axes = np.linalg.svd(seen[layer].numpy() - mean)[2][:2]
        again = (unseen[layer].numpy() - mean) @ axes.T @ axes + mean
        ours = coding.decode(coding.encode(unseen)[0])[layer].numpy()
        np.testing.assert_allclose(ours, again, atol=2e-2)  # kept as float16
        lost = np.square(again - unseen[layer].numpy()).sum() / np.square(unseen[layer] - unseen[layer].mean(0)).sum()
        assert quality["explained_variance"][layer] == pytest.approx(1 - float(lost), abs=1e-3)
    assert min(encoding.fit_coding(seen, unseen, 3, False)[1]["explained_variance"]) > 0.999


@pytest.mark.parametrize("components", [None, 3])
def test_int8_is_off_by_half_a_step_at_most_and_counts_what_it_clips(components: int | None) -> None:
    seen = low_rank(400, 1)
    coding, quality = encoding.fit_coding(seen, low_rank(300, 2), components, True)

    assert coding.scale is not None
    kept, clipped = coding.encode(seen)

    assert (kept.dtype, clipped) == (torch.int8, 0)
    plain = encoding.FeatureCoding(coding.mean, coding.basis)
    between = plain.decode(plain.encode(seen)[0]) - coding.decode(kept)
    if components is None:
        assert ((seen - coding.decode(kept)).abs() <= 0.501 * coding.scale[:, None]).all()

    assert between.abs().max() < 0.2
    assert min(quality["cosine"]) > 0.999
    assert coding.encode(seen * 100)[1] > 0


def test_a_codings_file_is_read_back(tmp_path: Path) -> None:
    written = {v: encoding.fit_coding(low_rank(50, n), low_rank(50, n), 4, n > 0)[0] for n, v in enumerate(("y", "z"))}
    for name in ("a.npz", "b.npz"):
        encoding.save_codings(tmp_path / name, written)

    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    for view, coding in encoding.load_codings(tmp_path / "a.npz").items():
        assert torch.equal(
            coding.decode(coding.encode(low_rank(9, 3))[0]),
            written[view].decode(written[view].encode(low_rank(9, 3))[0]),
        )

    (tmp_path / "a.npz").write_bytes(b"no")
    with pytest.raises(InputError, match="without which the features cannot be decoded"):
        encoding.load_codings(tmp_path / "a.npz")


@pytest.mark.slow
@pytest.mark.parametrize("keys", [["dtype=int8"], ["pca=24"], ["pca=24", "dtype=int8"]])
def test_readers_see_all_channels_and_the_manifest_the_loss(
    configure: Configure, cache_folder: Path, tmp_path: Path, keys: list[str]
) -> None:
    cfg = configure(tmp_path / "c", *keys)
    assert precompute.run(cfg) == 0

    whole, small = FeatureCache(cache_folder), FeatureCache(cfg.out)
    assert small.dim == whole.dim == 192

    for view in ("z", "y", "x"):
        near, exact = (c.read_crop("a", BOX, PATCH)[view].float() for c in (small, whole))
        assert near.shape == exact.shape
        cosine = torch.cosine_similarity(near, exact, dim=1).mean((1, 2, 3))
        reported = torch.tensor(small.manifest["coding_quality"][view]["cosine"])
        torch.testing.assert_close(cosine, reported.float(), atol=0.02, rtol=0)
        assert (cosine > 0.97).all()
        torch.testing.assert_close(small.mean[view], whole.mean[view], atol=0.05, rtol=0.05)
    size = {p: sum(f.stat().st_size for f in p.glob("*.h5")) for p in (cache_folder, cfg.out)}

    assert size[cfg.out] < 0.8 * size[cache_folder]
    assert cache_tool.main(["verify", str(cfg.out)]) == 0

    before = {p.name: p.read_bytes() for p in cfg.out.glob("*.h5")}
    (cfg.out / CODING).unlink()

    with pytest.raises(InputError, match="missing or not the one they were made with"):
        FeatureCache(cfg.out)
    assert precompute.run(cfg) == 0
    assert {p.name: p.read_bytes() for p in cfg.out.glob("*.h5")} == before
    assert (cfg.out / MANIFEST).exists()


def test_more_components_than_there_are_is_refused(configure: Configure, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the teacher has 192 channels, 193 components are more"):
        precompute.run(configure(tmp_path / "c", "pca=193"))
    with pytest.raises(InputError, match="ask for fewer components"):
        encoding.fit_coding(low_rank(3, 0), low_rank(3, 0), 5, False)
