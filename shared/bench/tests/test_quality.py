from __future__ import annotations

import math
import sys
import types

import numpy as np
import pytest
import torch
from pared_bench import quality
from torch import Tensor


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _frechet_by_definition(a: Tensor, b: Tensor) -> float:
    x, y = a.double().numpy(), b.double().numpy()
    first, second = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    # the trace of a matrix's root is the sum of the roots of its eigenvalues
    root = np.sqrt(np.linalg.eigvals(first @ second).astype(complex)).real.sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * root)


@pytest.mark.parametrize("samples", [(200, 300), (5, 7), (5, 300)])
def test_the_frechet_distance_equals_its_definition(samples: tuple[int, int], generator: torch.Generator) -> None:
    first = torch.randn(samples[0], 12, generator=generator)
    second = 1.5 * torch.randn(samples[1], 12, generator=generator) + 0.3
    expected = _frechet_by_definition(first, second)
    assert quality.frechet_distance(first, second) == pytest.approx(expected, rel=1e-4)


def test_a_shift_alone_adds_its_square(generator: torch.Generator) -> None:
    features = torch.randn(50, 4, generator=generator)
    assert quality.frechet_distance(features, features + 2) == pytest.approx(4 * 2**2, rel=1e-6)
    assert quality.frechet_distance(features, features) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("shape", [(1, 4), (5, 3), (5,)])
def test_features_that_do_not_fit_are_refused_with_their_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(5, 4\)"):
        quality.frechet_distance(torch.zeros(5, 4), torch.zeros(shape))


def test_the_bootstrap_error_of_a_mean_is_its_standard_error(generator: torch.Generator) -> None:
    values = torch.randn(400, generator=generator)
    spread = quality.bootstrap(lambda sample: float(sample.mean()), values, resamples=400)
    assert spread.standard_error == pytest.approx(1 / math.sqrt(400), rel=0.2)
    assert spread.low < float(values.mean()) < spread.high


def test_the_bootstrap_repeats_itself_by_seed() -> None:
    first = quality.bootstrap(np.mean, [1.0, 2.0, 5.0], seed=1)
    assert first == quality.bootstrap(np.mean, [1.0, 2.0, 5.0], seed=1)
    assert first != quality.bootstrap(np.mean, [1.0, 2.0, 5.0], seed=2)


def test_psnr_of_a_known_error() -> None:
    image = torch.zeros(2, 3, 4, 4)
    noisy = image.clone()
    noisy[0] += 0.1
    values = quality.psnr(noisy, image)
    assert values[0].item() == pytest.approx(20.0, abs=1e-5)
    assert values[1].item() == math.inf


def test_psnr_follows_the_range_of_the_data() -> None:
    assert quality.psnr(torch.full((1, 4), 25.5), torch.zeros(1, 4), data_range=255).item() == pytest.approx(20.0)


def test_ssim_equals_the_reference_implementation(generator: torch.Generator) -> None:
    metrics = pytest.importorskip("skimage.metrics")
    first = torch.rand(2, 3, 24, 20, generator=generator, dtype=torch.float64)
    second = (first + 0.1 * torch.randn(first.shape, generator=generator, dtype=torch.float64)).clamp(0, 1)
    ours = quality.ssim(first, second)
    for index in range(2):
        _, maps = metrics.structural_similarity(
            first[index].numpy(),
            second[index].numpy(),
            channel_axis=0,
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            full=True,
        )
        # the reference pads; the window fits only inside a border of five pixels
        assert ours[index].item() == pytest.approx(maps[:, 5:-5, 5:-5].mean(), abs=1e-6)


def test_ssim_of_equal_images_is_one(generator: torch.Generator) -> None:
    image = torch.rand(1, 3, 16, 16, generator=generator)
    assert quality.ssim(image, image).item() == pytest.approx(1.0)


def test_an_image_smaller_than_the_window_is_refused() -> None:
    with pytest.raises(ValueError, match="of at least 11"):
        quality.ssim(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


def test_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="equal shapes"):
        quality.psnr(torch.zeros(1, 3, 8, 8), torch.zeros(2, 3, 8, 8))


def test_the_feature_distance_compares_directions_of_features(generator: torch.Generator) -> None:
    images = torch.rand(3, 3, 8, 8, generator=generator)
    opposite = quality.feature_distance(images, images, features=lambda x: [x, -x])
    assert torch.equal(opposite, torch.zeros(3))
    scaled = quality.feature_distance(2 * images, images, features=lambda x: [x])
    assert torch.allclose(scaled, torch.zeros(3), atol=1e-6)
    negated = quality.feature_distance(-images, images, features=lambda x: [x, x])
    assert torch.allclose(negated, torch.full((3,), 4.0), atol=1e-4)


def test_the_feature_distance_asks_the_zoo_for_its_network(monkeypatch: pytest.MonkeyPatch) -> None:
    real = types.ModuleType("pared_zoo.real")
    seen = []

    def efficientnet_features(images: Tensor, *, maps: bool) -> list[Tensor]:
        seen.append(maps)
        return [images]

    real.efficientnet_features = efficientnet_features  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pared_zoo.real", real)
    quality.feature_distance(torch.ones(1, 3, 4, 4), torch.ones(1, 3, 4, 4))
    assert seen == [True, True]


@pytest.mark.parametrize("kind", ["uint8 array", "float tensor", "pil"])
def test_pictures_of_every_kind_become_one_array(kind: str) -> None:
    from PIL import Image

    array = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    kinds = {
        "uint8 array": array,
        "float tensor": torch.from_numpy(array).permute(0, 3, 1, 2) / 255,
        "pil": [Image.fromarray(image) for image in array],
    }
    assert np.array_equal(quality.as_uint8(kinds[kind]), array)


def test_pictures_with_the_channels_elsewhere_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(batch, 3, height, width\) when floating, got \(2, 4, 4, 3\)"):
        quality.as_uint8(torch.zeros(2, 4, 4, 3))


def test_renders_of_scenes_show_what_their_captions_say() -> None:
    world = pytest.importorskip("pared_zoo.world")
    scenes = world.sample_scenes(6, seed=0)
    images = world.render(scenes, 64)
    accuracy = quality.attribute_accuracy(torch.from_numpy(images).permute(0, 3, 1, 2) / 255, scenes)
    assert accuracy["mean"] > 0.95
    assert quality.attribute_accuracy(images[::-1].copy(), scenes)["mean"] < 0.9


def test_perplexity_of_even_odds_is_the_size_of_the_vocabulary() -> None:
    sequence = torch.randint(0, 11, (2, 9))
    assert quality.perplexity(lambda x: torch.zeros(*x.shape, 11), [sequence]) == pytest.approx(11.0)


def test_perplexity_scores_the_next_token_and_skips_the_context() -> None:
    sequence = torch.tensor([[0, 1, 2, 3]])

    def model(tokens: Tensor) -> types.SimpleNamespace:
        logits = torch.full((*tokens.shape, 4), -1e4)
        logits[:, :-1].scatter_(2, tokens[:, 1:, None], 0.0)
        logits[:, 0] = 0.0
        return types.SimpleNamespace(logits=logits)

    assert quality.perplexity(model, [sequence]) == pytest.approx(4 ** (1 / 3))
    assert quality.perplexity(model, [sequence], skip=2) == pytest.approx(1.0)


def test_perplexity_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no token after the first 5"):
        quality.perplexity(lambda x: torch.zeros(*x.shape, 4), [torch.zeros(1, 3, dtype=torch.int64)], skip=5)


def test_answers_count_whatever_their_case_and_full_stop() -> None:
    assert quality.answer_accuracy([" Red.", "two", "left of"], ["red", "three", "Left  of"]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="got 1, 2"):
        quality.answer_accuracy(["a"], ["a", "b"])


def test_the_hypervolume_of_a_staircase() -> None:
    points = [(1.0, 3.0), (2.0, 2.0), (3.0, 1.0), (2.5, 2.5), (9.0, 0.0)]
    assert quality.hypervolume(points, (4.0, 4.0)) == pytest.approx(1 * 3 + 1 * 2 + 1 * 1)
    assert quality.hypervolume([], (1.0, 1.0)) == 0
