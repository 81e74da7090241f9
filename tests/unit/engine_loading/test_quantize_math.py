"""The arithmetic of quantization: grids, GPTQ, scaling and packing do what their papers promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_engine.errors import ConfigError
from octavo_engine.quantize.compressed_tensors import encode, pack
from octavo_engine.quantize.folding import Fold
from octavo_engine.quantize.gptq import gptq
from octavo_engine.quantize.observed import Projection
from octavo_engine.quantize.scaling import awq_scale, smoothquant_scale
from octavo_engine.quantize.scheme import Method, Scheme, as_int_weight, choose_scheme, fit_grid
from octavo_engine.quantize.statistics import InputStatistics

SCHEMES = [Scheme(4, 32, True), Scheme(4, 32, False), Scheme(4, 0, True), Scheme(8, 0, True), Scheme(8, 32, True)]


def _weight(rows: int = 48, columns: int = 128, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1


def _inputs(columns: int = 128, tokens: int = 512, outliers: bool = False) -> torch.Tensor:
    """Activations that depend on each other, as real ones do; a few channels much larger if asked."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(tokens, columns, generator=generator) @ mix
    if outliers:
        x[:, ::16] *= 30
    return x


def _statistics(x: torch.Tensor) -> InputStatistics:
    statistics = InputStatistics(x.shape[1], x.device)
    for part in x.split(100):
        statistics.add(part)
    return statistics


def _projection(weight: torch.Tensor) -> Projection:
    return Projection({"model.layers.0.mlp.down_proj": weight.shape[0]}, weight.clone(), None)


# ---------------------------------------------------------------- grids


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: f"{scheme.name}-{scheme.symmetric}")
def test_codes_stay_in_range_and_stand_for_what_is_stored(scheme: Scheme) -> None:
    weight = _weight()
    grid = fit_grid(weight, scheme)
    codes = grid.codes(weight)
    stored = as_int_weight(codes, grid, scheme)
    assert codes.min() >= grid.low
    assert codes.max() <= grid.high
    assert torch.equal(stored.dequantize(), grid.values(codes))
    assert stored.shape == tuple(weight.shape)


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=64, max_size=64),
    symmetric=st.booleans(),
    bits=st.sampled_from([4, 8]),
)
def test_rounding_never_errs_by_more_than_the_range_of_the_group(
    values: list[float], symmetric: bool, bits: int
) -> None:
    weight = torch.tensor(values).view(2, 32)
    rounded = fit_grid(weight, Scheme(bits, 32, symmetric)).rounded(weight)
    assert torch.isfinite(rounded).all()
    assert ((rounded - weight).abs() <= weight.abs().amax(1, keepdim=True) * 0.5 + 1e-6).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_larger_side_of_a_group_gets_the_code_that_the_other_has_not(sign: int) -> None:
    weight = torch.arange(-7, 9).repeat(2).float().unsqueeze(0) * sign

    grid = fit_grid(weight, Scheme(4, 32, symmetric=True))

    assert torch.equal(grid.rounded(weight), weight)
    assert torch.sign(grid.scales).item() == -sign
    assert torch.equal(as_int_weight(grid.codes(weight), grid, Scheme(4, 32, symmetric=True)).dequantize(), weight)


def test_cutting_off_extremes_lowers_the_error() -> None:
    weight = _weight()
    weight[:, 0] *= 12
    scheme = Scheme(4, 128, True)
    plain = (fit_grid(weight, scheme, cut_extremes=False).rounded(weight) - weight).square().sum()
    assert (fit_grid(weight, scheme).rounded(weight) - weight).square().sum() < plain * 0.9


def test_zeros_are_exact() -> None:
    weight = torch.zeros(4, 64)
    for scheme in SCHEMES:
        assert torch.equal(fit_grid(weight, scheme).rounded(weight), weight)


@pytest.mark.parametrize(
    ("method", "bits", "group", "symmetric", "expected"),
    [
        (Method.GPTQ, 4, None, True, Scheme(4, 32, True)),
        (Method.GPTQ, 4, 64, True, Scheme(4, 64, True)),
        (Method.RTN, 4, 32, False, Scheme(4, 32, False)),
        (Method.RTN, 8, None, True, Scheme(8, 0, True)),
        (Method.RTN, 4, 0, True, Scheme(4, 0, True)),
        (Method.SMOOTHQUANT, 8, None, True, Scheme(8, 0, True, 8)),
    ],
)
def test_a_scheme_is_chosen_that_fits_every_width(method, bits, group, symmetric, expected) -> None:
    assert choose_scheme(method, bits, group, symmetric, [576, 1536]) == expected


@pytest.mark.parametrize(
    ("method", "bits", "group", "symmetric", "message"),
    [
        (Method.RTN, 3, None, True, "must be 4 or 8, got 3"),
        (Method.RTN, 4, 128, True, r"does not divide the model's widths; possible: \[64, 32, 16\]"),
        (Method.RTN, 4, 1, True, "does not divide"),
        (Method.SMOOTHQUANT, 4, None, True, "8 bits, without groups"),
        (Method.SMOOTHQUANT, 8, 64, True, "8 bits, without groups"),
        (Method.GPTQ, 8, None, False, "only for 4 bits"),
    ],
)
def test_an_impossible_scheme_names_the_setting(method, bits, group, symmetric, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_scheme(method, bits, group, symmetric, [576, 1536])


def test_wide_layers_take_large_groups_without_zero_points() -> None:
    assert choose_scheme(Method.AWQ_GPTQ, 4, None, True, [4096, 14_336]) == Scheme(4, 128, True)
    assert choose_scheme(Method.AWQ_GPTQ, 4, None, True, [2_048, 8_256]) == Scheme(4, 64, True)


def test_widths_no_group_divides_are_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match="--group-size 0"):
        choose_scheme(Method.RTN, 4, None, True, [100, 50])


# ---------------------------------------------------------------- GPTQ


@pytest.mark.parametrize("scheme", SCHEMES[:3], ids=lambda scheme: f"{scheme.name}-{scheme.symmetric}")
def test_gptq_leaves_less_error_in_the_outputs_than_rounding(scheme: Scheme) -> None:
    weight, x = _weight(), _inputs()
    statistics = _statistics(x)
    codes, grid = gptq(weight, statistics, scheme)
    rounded = fit_grid(weight, scheme, statistics.mean_square).rounded(weight)
    error = (x @ (grid.values(codes) - weight).t()).square().sum()
    assert error < 0.8 * (x @ (rounded - weight).t()).square().sum()


def test_gptq_with_independent_inputs_is_plain_rounding() -> None:
    weight = _weight()
    statistics = _statistics(torch.eye(128).repeat(8, 1))
    codes, grid = gptq(weight, statistics, SCHEMES[0])
    assert torch.equal(codes, grid.codes(weight))


def test_gptq_bears_inputs_that_never_occur() -> None:
    x = _inputs()
    x[:, 5:20] = 0
    codes, grid = gptq(_weight(), _statistics(x), SCHEMES[0])
    assert torch.isfinite(grid.values(codes)).all()


def test_gptq_bears_fewer_tokens_than_inputs() -> None:
    codes, grid = gptq(_weight(), _statistics(_inputs(tokens=8)), SCHEMES[0])
    assert torch.isfinite(grid.values(codes)).all()


# ---------------------------------------------------------------- scaling


def test_statistics_add_up_over_calls() -> None:
    x = _inputs()
    statistics = _statistics(x)
    torch.testing.assert_close(statistics.gram, x.t() @ x, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(statistics.absolute, x.abs().sum(0))
    scale = torch.rand(128) + 0.5
    statistics.rescale(scale)
    torch.testing.assert_close(statistics.gram, (x / scale).t() @ (x / scale), rtol=1e-3, atol=1e-3)


def test_awq_protects_inputs_that_are_large() -> None:
    x, weight = _inputs(outliers=True), _weight()
    scheme, statistics = Scheme(4, 32, True), _statistics(x)
    fold = Fold(_projection(weight), norm=torch.ones(128))
    scale = awq_scale(fold, statistics, scheme)

    def output_error(scale: torch.Tensor) -> float:
        scaled = weight * scale
        return float((x @ (fit_grid(scaled, scheme).rounded(scaled) / scale - weight).t()).square().sum())

    assert output_error(scale) < 0.7 * output_error(torch.ones(128))
    assert scale[::16].mean() > scale.mean()


def test_smoothquant_evens_out_activations() -> None:
    x, scheme = _inputs(outliers=True), Scheme(8, 0, True, 8)
    fold = Fold(_projection(_weight()), norm=torch.ones(128))
    scale = smoothquant_scale(fold, _statistics(x), scheme)
    before, after = x.abs().amax(0), (x / scale).abs().amax(0)
    assert after.max() / after.median() < 0.5 * before.max() / before.median()


def test_folding_into_a_norm_changes_nothing_but_rounding() -> None:
    weight, norm, x = _weight(), torch.rand(128) + 0.5, _inputs()
    projection = _projection(weight)
    expected = (x * norm) @ weight.t()
    Fold(projection, norm=norm).apply(torch.rand(128) + 0.5, _statistics(x))
    torch.testing.assert_close((x * norm) @ projection.weight.t(), expected, rtol=1e-4, atol=1e-4)


def test_heads_that_share_a_value_channel_share_its_scale() -> None:
    fold = Fold(_projection(_weight()), heads=(4, 2))
    scale = fold.shared(torch.rand(128) + 0.5).view(2, 2, 32)
    assert torch.equal(scale[:, 0], scale[:, 1])


# ---------------------------------------------------------------- packing


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 40), bits=st.sampled_from([4, 8]), seed=st.integers(0, 99))
def test_packing_equals_the_compressed_tensors_package(rows: int, columns: int, bits: int, seed: int) -> None:
    reference = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    half = 1 << (bits - 1)
    signed = torch.randint(-half, half, (rows, columns), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(pack(signed + half, bits), reference.pack_to_int32(signed.to(torch.int8), bits))


@pytest.mark.parametrize("symmetric", [True, False])
def test_encoded_tensors_decode_with_the_compressed_tensors_package(symmetric: bool) -> None:
    reference = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    weight, scheme = _weight(), Scheme(4, 32, symmetric)
    grid = fit_grid(weight, scheme)
    tensors = encode("p", as_int_weight(grid.codes(weight), grid, scheme), scheme)
    codes = reference.unpack_from_int32(tensors["p.weight_packed"], 4, torch.Size(tensors["p.weight_shape"].tolist()))
    groups = codes.float().view(48, 4, 32)
    if not symmetric:
        zeros = reference.unpack_from_int32(tensors["p.weight_zero_point"], 4, torch.Size((48, 4)), packed_dim=0)
        groups = groups - zeros.float().unsqueeze(-1)
    values = (groups * tensors["p.weight_scale"].float().unsqueeze(-1)).view(48, 128)
    assert torch.equal(values, grid.rounded(weight))
