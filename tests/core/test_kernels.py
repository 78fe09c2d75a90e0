"""The fused kernels compute what plain torch does, whatever the layer looks like, and step aside where they cannot run.

They run through Triton's interpreter here, so that no GPU is needed; a GPU's own rounding is not seen by these tests.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from test_delta_memory import Made
from torch import Tensor
from toy import CFG, Layers, Log, Toy, as_dense, inputs, toy_layers

from lib_dynfuse.core import Fusion, kernels, strategy
from lib_dynfuse.core.packed import Product

pytest.importorskip("triton")
# The interpreter computes with numpy, which warns where a kernel makes an infinity that it then leaves out.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kernels, "_switched_off", False)
    # Trying them first takes seconds in the interpreter; one test does it.
    monkeypatch.setattr(kernels, "_proven", lambda device, dtype: True)
    # The fewer the tiles, the faster is the interpreter.
    monkeypatch.setattr(kernels, "_tile", lambda tokens, rank: (32, 128, 32))
    with kernels.path("triton"):
        yield


def rand(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * size


class Case:
    """Features [2, T, C] and two low-rank deltas, their ranks' products side by side as `Packed` has them."""

    def __init__(
        self, dtype: torch.dtype = torch.float32, size: float = 0.1, ranks: tuple[int, int] = (4, 20), tokens: int = 18
    ) -> None:
        self.rank = ranks[0]
        self.base = rand(2, tokens, 70, size=2.0).to(dtype)
        self.hidden = rand(2, tokens, sum(ranks), seed=1).to(dtype)
        self.up = (rand(sum(ranks), 70, seed=2, size=size) / sum(ranks) ** 0.5).to(dtype)

    def products(self) -> tuple[Product, Product]:
        split = slice(0, self.rank), slice(self.rank, None)
        subject, style = (Product(self.hidden[..., part], self.up[part]) for part in split)
        return subject, style

    def deltas(self) -> tuple[Tensor, Tensor]:
        subject, style = (one.hidden.double() @ one.up.double() for one in self.products())
        return subject, style

    def exact(self, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """In float64, by the definition."""
        p0 = (self.base.double() / temperature).log_softmax(-1)
        moved = [((self.base.double() + delta) / temperature).log_softmax(-1) for delta in self.deltas()]
        subject, style = ((p.exp() * (p - p0)).sum(-1) for p in moved)
        return subject, style

    def found(self, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        found = kernels.kl_pair(self.base, *self.products(), temperature)
        assert found is not None
        return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-3, 300.0])
def test_divergences_are_exact_for_weak_and_for_huge_deltas(dtype: torch.dtype, size: float) -> None:
    case = Case(dtype, size)
    for found, exact in zip(case.found(), case.exact(), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("ranks", [(4, 80), (256, 8)])
def test_ranks_may_be_mixed(ranks: tuple[int, int]) -> None:
    case = Case(ranks=ranks)
    for found, exact in zip(case.found(), case.exact(), strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-9)


def test_a_temperature_divides_features_and_deltas() -> None:
    case = Case()
    for found, exact in zip(case.found(2.0), case.exact(2.0), strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-9)


def test_every_token_takes_the_form_that_suits_it_and_tiles_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_tile", lambda tokens, rank: (16, 32, 16))
    case = Case()
    case.hidden *= torch.logspace(-3, 4, 18).view(1, -1, 1)
    for found, exact in zip(case.found(), case.exact(), strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=2e-4, atol=1e-12)


def test_channels_may_come_first_in_memory_and_a_layer_may_be_a_part_of_a_wider_one() -> None:
    case = Case()
    exact = case.exact()
    wide = torch.zeros(2, 18, 200)
    wide[..., 60:130] = case.base
    for base in (case.base.transpose(1, 2).contiguous().transpose(1, 2), wide[..., 60:130]):
        case.base = base
        case.hidden = case.hidden.transpose(1, 2).contiguous().transpose(1, 2)
        for found, one in zip(case.found(), exact, strict=True):
            torch.testing.assert_close(found.double(), one, rtol=1e-4, atol=1e-9)


def test_features_that_are_not_numbers_give_no_number() -> None:
    case = Case()
    case.base[0, 3, 5] = float("nan")
    case.hidden[1, 7, 0] = float("inf")
    subject, style = case.found()
    assert subject[0, 3].isnan()
    assert style[0, 3].isnan()
    assert subject[1, 7].isnan()
    assert not style[1, 7].isnan()


def close_to(found: Tensor, expected: Tensor) -> None:
    """Within the rounding of the dtype, of terms that may be several times the sum."""
    rounding = 8 * torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize(("dtype", "ranks"), [*zip(DTYPES, [(4, 20)] * 3, strict=True), (torch.float16, (80, 4))])
def test_each_item_gets_its_winners_product(dtype: torch.dtype, ranks: tuple[int, int]) -> None:
    case = Case(dtype, 1.0, ranks)
    subject, style = case.deltas()
    expected = case.base.double() + torch.stack([subject[0], style[1]])
    wins = torch.tensor([[True], [False]])
    assert kernels.add(case.base, case.hidden, case.up, case.rank, wins, ~wins)
    close_to(case.base, expected)


@pytest.mark.parametrize(("dtype", "tokens"), [(torch.float32, 1), (torch.float16, 18), (torch.bfloat16, 18)])
def test_weights_may_be_numbers_and_may_differ_from_token_to_token(dtype: torch.dtype, tokens: int) -> None:
    case = Case(dtype, 1.0, tokens=tokens)
    subject, style = case.deltas()
    base = case.base.clone()
    for weights in (rand(2, 1, seed=5).sigmoid(), rand(2, tokens, seed=5).sigmoid(), rand(2, tokens, seed=5) > 0):
        others = ~weights if weights.dtype == torch.bool else 1 - weights
        found = base.clone()
        assert kernels.add(found, case.hidden, case.up, case.rank, weights, others)
        close_to(found, base.double() + weights.double()[..., None] * subject + others.double()[..., None] * style)


def test_what_is_not_chosen_stays_out_even_where_it_is_infinite() -> None:
    for weights in (torch.tensor([[True], [True]]), torch.ones(2, 18, dtype=torch.bool), torch.ones(2, 1)):
        case = Case()
        case.hidden[..., case.rank :] = float("inf")
        others = ~weights if weights.dtype == torch.bool else 1 - weights
        assert kernels.add(case.base, case.hidden, case.up, case.rank, weights, others)
        assert bool(case.base.isfinite().all())


def test_a_product_is_added_in_the_outputs_own_memory() -> None:
    case = Case(size=1.0)
    expected = case.base.double() + case.deltas()[0]
    wide = torch.zeros(2, 200, 18)
    target = wide.transpose(1, 2)[..., 60:130]
    target.copy_(case.base)
    wins = torch.tensor([[True], [True]])
    assert kernels.add(target, case.hidden, case.up, case.rank, wins, ~wins)
    close_to(target, expected)
    assert float(wide[:, :60].abs().sum() + wide[:, 130:].abs().sum()) == 0.0


def some_layers(model: Toy) -> Layers:
    """A convolution with a stride and a linear layer."""
    layers = toy_layers(model, 0.2, 0.2)
    return {name: layers[name] for name in ("down", "to_q")}


def through_the_engine(name: str, dtype: torch.dtype = torch.float32, **parameters: object) -> tuple[Tensor, Log]:
    model = Toy().to(dtype)
    log = Log()
    with torch.no_grad(), Fusion(some_layers(model), strategy(name, **parameters), log) as fusion:
        fusion.rows = CFG
        fusion.at(0, 10)
        result: Tensor = model(*(one.to(dtype) for one in inputs()))
    return result, log


RULES = [
    ("kl", {}),
    ("kl", {"auto_balance": True, "couple_cfg": True}),
    ("kl", {"sample_tokens": 5}),
    ("kl", {"standardise": True, "temperature": 2.0}),
    ("kl-token", {}),
    ("kl-soft", {}),
    ("kl-cfg", {"ceiling": 0.3}),
    ("js", {}),
]


@pytest.mark.parametrize(("name", "parameters"), RULES, ids=[f"{name} {' '.join(given)}" for name, given in RULES])
def test_a_fused_model_chooses_and_computes_alike(name: str, parameters: dict[str, object]) -> None:
    with kernels.path("torch"):
        expected, reference = through_the_engine(name, **parameters)
    found, log = through_the_engine(name, **parameters)
    assert kernels.usable(found), "the kernels must not have given up"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(log.calls) == 2
    for call, other in zip(log.calls, reference.calls, strict=True):
        torch.testing.assert_close(torch.as_tensor(call[1]), torch.as_tensor(other[1]), rtol=1e-4, atol=1e-5)


def test_the_kernels_are_what_a_fused_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    for name in ("kl_pair", "add"):
        real = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *given, real=real, name=name: (started.append(name), real(*given))[1])
    through_the_engine("kl")
    assert started == ["kl_pair", "add"] * 2


def test_nothing_of_an_outputs_size_is_made() -> None:
    case = Case()
    with Made() as made:
        case.found()
        wins = torch.tensor([[True], [False]])
        kernels.add(case.base, case.hidden, case.up, case.rank, wins, ~wins)
    assert made.largest == 2 * case.base.shape[0] * case.base.shape[1], "two numbers a token"


def test_deltas_of_other_kinds_go_on_in_plain_torch() -> None:
    model = Toy()
    low_rank = some_layers(model)
    mixed = {**low_rank, "to_q": as_dense(toy_layers(model))["to_q"]}
    found = []
    for way in ("torch", "triton"):
        with kernels.path(way), torch.no_grad(), Fusion(mixed, strategy("kl")):
            found.append(model(*inputs()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_a_kernel_that_cannot_be_built_takes_all_out_of_use(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        @property
        def statistics(self) -> object:
            raise RuntimeError("no C compiler")

    with kernels.path("torch"):
        expected, _ = through_the_engine("kl")
    monkeypatch.setattr(kernels, "_kernels", Broken)
    found, _ = through_the_engine("kl")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert [record.getMessage() for record in caplog.records] == [
        "DynFuse's kernels are off, plain torch takes their place: no C compiler"
    ]


def test_gradients_go_the_way_that_autograd_knows() -> None:
    found = []
    for way in ("torch", "triton"):
        model, (image, time) = Toy(), inputs()
        image.requires_grad_()
        with kernels.path(way), Fusion(some_layers(model), strategy("kl")):
            model(image, time).square().sum().backward()
        assert image.grad is not None
        found.append(image.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_they_are_tried_once_and_draw_no_random_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    kernels._proven.cache_clear()
    before = torch.get_rng_state()
    with kernels.path("triton"):
        assert kernels.usable(torch.zeros(1, 2, 3))
    assert torch.equal(torch.get_rng_state(), before)
    assert kernels.why_not(CPU, torch.float32) == ""
    kernels._proven.cache_clear()
    monkeypatch.setattr(kernels, "add", lambda *given: True)
    with kernels.path("triton"):
        assert not kernels.usable(torch.zeros(1, 2, 3)), "an add that adds nothing is found out"
    kernels._proven.cache_clear()


def test_a_fusion_tries_them_before_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[torch.device, torch.dtype]] = []
    monkeypatch.setattr(kernels, "_proven", lambda *place: tried.append(place) or True)
    model = Toy()
    with Fusion(some_layers(model), strategy("kl")):
        assert tried == [(CPU, torch.float32)]


def test_they_stay_off_where_there_is_nothing_to_run_them(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.zeros(1, 2, 3)
    assert kernels.usable(tokens)
    assert not kernels.usable(tokens.double())
    with kernels.path("auto"):
        assert not kernels.usable(tokens), "a CPU is faster without an interpreter"
    with kernels.path("torch"):
        assert not kernels.usable(tokens)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not kernels.usable(tokens)
    assert kernels.why_not(CPU, torch.float32) == "there is no Triton for cpu, and TRITON_INTERPRET=1 is not set"


def test_an_unknown_path_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown path 'fast'; there are: auto, torch, triton"), kernels.path("fast"):
        pass
