"""backbone/routing.py: the key that an image goes to, against scipy's Gaussians, and what is kept of keys."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import Tensor

from backbone.routing import PRIOR, STATISTICS, Moments, Router

WIDTH = 6


def tokens_of(kind: int, images: int, seed: int) -> Tensor:
    """Patch tokens `[b, 9, d]` whose channels differ in mean and spread by kind."""
    stream = torch.Generator().manual_seed(seed)
    return torch.randn(images, 9, WIDTH, generator=stream) * (1 + kind) + 2 * kind * torch.linspace(-1, 1, WIDTH)


def moments(router: Router, tokens: Tensor) -> Moments:
    looks = router.statistics(tokens)
    return Moments.of(len(looks), looks.sum(0), looks.T @ looks)


@pytest.fixture
def router() -> Router:
    made = Router(WIDTH, seed=3)
    for kind, images in ((0, 60), (1, 40), (2, 50)):
        made.found(10 * kind, moments(made, tokens_of(kind, images, kind)))
    return made


def test_statistics_are_mixtures_of_means_and_deviations(router: Router) -> None:
    tokens = tokens_of(1, 5, 7)
    plain = np.concatenate([tokens.double().numpy().mean(1), tokens.double().numpy().std(1)], 1) @ router.mixtures.numpy()
    assert np.allclose(router.statistics(tokens).numpy(), plain) and plain.shape == (5, min(STATISTICS, 2 * WIDTH))


def test_an_image_goes_to_the_key_that_makes_it_most_likely(router: Router) -> None:
    images = torch.cat([tokens_of(kind, 20, 50 + kind) for kind in range(3)])
    looks = {kind: router.statistics(tokens_of(kind, count, kind)).numpy() for kind, count in ((0, 60), (1, 40), (2, 50))}
    size = 2 * WIDTH
    within = sum((x - x.mean(0)).T @ (x - x.mean(0)) for x in looks.values()) / 150
    scores = []
    for x in looks.values():
        covariance = ((x - x.mean(0)).T @ (x - x.mean(0)) + PRIOR * size * within) / (len(x) + PRIOR * size)
        covariance += 1e-3 * covariance.diagonal().mean() * np.eye(size)
        scores.append(multivariate_normal(x.mean(0), covariance).logpdf(router.statistics(images).numpy()))
    assert router(images).tolist() == np.stack(scores).argmax(0).tolist()
    assert (router(images).reshape(3, 20) == torch.arange(3)[:, None]).float().mean() > 0.9, "kinds this far apart are told"


def test_of_two_keys_with_one_mean_the_narrower_has_the_images_near_it() -> None:
    router, size = Router(2, seed=0), 4
    for key, variance in ((0, 1.0), (1, 9.0)):
        router.found(key, Moments(1000, torch.zeros(size), 1000 * variance * torch.eye(size)))
    looks = torch.randn(200, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    router.statistics = lambda tokens: tokens
    within, scores = 5.0, []
    for variance in (1.0, 9.0):
        backed = (1000 * variance + PRIOR * size * within) / (1000 + PRIOR * size)
        scores.append(multivariate_normal(np.zeros(size), 1.001 * backed * np.eye(size)).logpdf(looks))
    expected = np.stack(scores).argmax(0)
    assert router(looks).tolist() == expected.tolist() and 50 < expected.sum() < 150


def test_i12_an_image_goes_where_it_goes_whatever_else_is_in_the_batch(router: Router) -> None:
    images = torch.cat([tokens_of(kind, 10, 90 + kind) for kind in range(3)])
    assert torch.cat([router(image[None]) for image in images]).equal(router(images))


def test_joining_is_having_seen_the_images_of_both(router: Router) -> None:
    first, second = tokens_of(1, 40, 1), tokens_of(1, 30, 8)
    router.found(30, moments(router, second))
    router.join(30, into=10)
    whole = moments(router, torch.cat([first, second]))
    assert router.tasks == [0, 10, 20] and router.moments[10].count == 70
    for mine, theirs in zip(router.moments[10][1:], whole[1:], strict=True):
        assert torch.allclose(mine, theirs)


def test_what_is_counted_is_what_learning_goes_on_with(router: Router) -> None:
    kept = [tensor for _, *tensors in router.state().values() for tensor in tensors]
    lower = [tensor if tensor.ndim == 1 else tensor[torch.tril(torch.ones_like(tensor)) > 0] for tensor in kept]
    assert [(t.numel(), t.dtype) for t in router.tensors()] == [(t.numel(), t.dtype) for t in lower]


def test_file_and_state_give_the_same_router(router: Router) -> None:
    images = torch.cat([tokens_of(kind, 10, 90 + kind) for kind in range(3)])
    read = Router(WIDTH, seed=3)
    read.from_file(router.to_file())
    assert read.tasks == [0, 10, 20] and read(images).equal(router(images))
    resumed = Router(WIDTH, seed=3)
    resumed.load(router.state(), torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(resumed.tensors(), router.tensors(), strict=True))


def test_a_key_costs_less_than_an_adapter_of_a_vit_b() -> None:
    router = Router(768, seed=0)
    looks = torch.randn(50, STATISTICS, dtype=torch.float64)
    router.found(0, Moments.of(50, looks.sum(0), looks.T @ looks))
    stored = sum(tensor.numel() for tensor in router.tensors())
    assert stored == STATISTICS + STATISTICS * (STATISTICS + 1) // 2 == 8384 < 12 * 2 * 2 * 768 * 10
