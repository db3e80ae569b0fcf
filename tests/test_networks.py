"""Whole networks in `bench`: checked, timed where each layer stands, and judged by the bar."""

import json

import pytest
import torch

import dynconv
from dynconv import calibration
from dynconv.__main__ import main
from dynconv._timing import Timing
from dynconv.cli import networks
from dynconv.cli.networks import NETWORKS, LayerRow, NetworkBench, make, measure_network, summarise_networks


@pytest.fixture(autouse=True)
def nothing_known():
    calibration.forget()
    yield
    calibration.forget()
    torch._dynamo.reset()


def timing(milliseconds):
    return Timing(milliseconds, milliseconds, milliseconds, 5)


def layer(dense, automatic, again=0):
    times = timing(dense), timing(again or dense), timing(automatic)
    return LayerRow("tiny", 1, "layer", 1, "a layer", 0.5, *times, "sparse")


@pytest.mark.parametrize(
    ("dense", "automatic", "is_below"),
    [(10, 10.2, False), (10, 10.4, True), (1, 1.04, True), (0.9, 0.94, False), (0.9, 0.96, True), (0.01, 0.07, True)],
)
def test_the_bar_is_a_share_of_large_layers_and_a_time_of_small_ones(dense, automatic, is_below):
    row = layer(dense, automatic)
    assert row.is_below_bar == is_below == row.record()["is_below_bar"]
    summary = summarise_networks([row, layer(2, 1), layer(0.5, 0.4), layer(2, 1, again=automatic / dense * 2)])
    assert (summary["rows"], summary["below"]) == (4, is_below)
    assert summary["noise"] == (automatic / dense > 1 / 0.97)  # the last one's dense, which is large
    assert summary["worst_large"] == pytest.approx(min(2, dense / automatic if dense >= 1 else 2))


# (blocks, of which have a shortcut, parameters in millions without normalisation and squeeze-and-excitation)
PUBLISHED = {"resnet50": (16, 16, 25.5), "mobilenetv2": (17, 10, 3.5), "regnety-800mf without se": (14, 14, 5.5)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_are_the_published_ones(name):
    network = make(name)
    blocks, shortcuts, millions = PUBLISHED[name]
    assert len(network.blocks) == blocks
    assert sum(block.shortcut_path is not None for block in network.blocks) == shortcuts
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    with torch.no_grad():
        output = network(torch.randn(1, 3, 64, 64))
    assert output.shape == (1, 1000) and output.isfinite().all() and output.std() > 1e-3


def test_a_pass_is_the_network():
    """Dense units make the network's own result; masked ones at density 1 the same, up to rounding."""
    bench, results = NetworkBench("tiny", 2, (0.5, 1.0), "blob", 64), []
    head = bench.network.head
    for kind in ("block", "layer"):
        assert [unit.name for unit in bench.units[kind]][:: len(bench.units[kind]) - 1] == ["stem", "head"]
        bench.units[kind][-1].dense = lambda value, shortcut: (results.append(head(value)), None)
        with torch.no_grad(), dynconv.backend("cpu"):
            for density in (None, 1.0, 0.5):
                assert len(bench.run(kind, density)) == len(bench.units[kind])
    expected = bench.network(bench.input)
    for of_kind in (results[:3], results[3:]):
        assert torch.equal(of_kind[0], expected)
        torch.testing.assert_close(of_kind[1], expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(of_kind[2], expected, rtol=1e-2, atol=1e-2)
    assert bench.density(0.5) == pytest.approx(0.5, abs=0.02)


def test_networks_are_checked_and_timed(monkeypatch):
    monkeypatch.setattr(NetworkBench, "compile", lambda self: (lambda: self.network(self.input), 1.5, None))
    rows, layers = measure_network("tiny", 1, (0.5,), repeats=2, seconds=0, calibration_seconds=0.001, size=64)
    (row,) = rows
    assert row.failure is None and row.check.passed and (row.masked, row.blocks) == (2, 3)
    record = row.record()
    assert record["ratio"] == pytest.approx(row.dense.median / row.automatic.median)
    assert record["compiled_ratio"] == pytest.approx(row.dense.median / row.compiled.median)
    # Two blocks with a shortcut; two blocks of three layers and one of three layers without.
    assert [found.kind for found in layers] == ["block"] * 2 + ["layer"] * 9
    assert {found.path for found in layers} <= {"sparse", "dense"}
    assert len({(found.kind, found.place) for found in layers}) == len(layers)
    assert sum(found.dense.median for found in layers if found.kind == "block") < row.dense.median


@pytest.mark.parametrize("kind", ["block", "layer"])
def test_wrong_networks_are_not_timed(monkeypatch, kind):
    monkeypatch.setattr(NetworkBench, "compile", lambda self: (None, None, "no"))
    if kind == "block":
        right = networks.Block.forward
        monkeypatch.setattr(networks.Block, "forward", lambda self, *a, **o: right(self, *a, **o) * 1.001)
    else:
        right = dynconv.masked_conv2d
        monkeypatch.setattr(dynconv, "masked_conv2d", lambda *a, **o: right(*a, **o) * 1.001)
    (row,), layers = measure_network("tiny", 1, (0.5,), repeats=1, seconds=0, calibration_seconds=0.001, size=64)
    assert row.failure.startswith("wrong result") and row.automatic is None and layers == []


def test_bench_shows_networks_first(monkeypatch, tmp_path, capsys):
    def no_compiler(*arguments, **options):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", no_compiler)
    results = tmp_path / "networks.json"
    command = ["bench", "--quick", "--networks", "tiny", "--repeats", "2", "--seconds", "0", "--density", "0.5", "1"]
    assert main([*command, "--json", str(results)]) == 0
    record = json.loads(results.read_text())
    assert [(row["network"], row["batch"], row["asked"]) for row in record["networks"]] == [
        ("tiny", 1, 1),
        ("tiny", 1, 0.5),
    ]
    for row in record["networks"]:
        assert row["compiled"] is None and row["no_compiler"] == "torch.compile does not work here: RuntimeError"
        assert row["ratio"] > 0 and row["sparse_ratio"] > 0
    assert len(record["network_layers"]) == 2 * 11 and record["rows"] == []
    assert record["summary"]["networks"]["rows"] == 2 * 11
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith("networks: forward passes") and "2 of 2 results within their bounds" in printed
    assert "layers below the bar (0.97x dense, or 0.05 ms more where dense takes less than 1 ms): " in printed
    assert f"dense itself, measured once more: {record['summary']['networks']['noise']}" in printed


def test_networks_are_refused_where_they_are_not_measured(capsys):
    with pytest.raises(SystemExit) as refused:
        main(["bench", "--networks", "tiny", "--dtype", "bfloat16"])
    assert refused.value.code == 2
    assert "argument --networks: expected --device cpu and --dtype float32" in capsys.readouterr().err


def test_which_networks_run():
    from types import SimpleNamespace

    from dynconv.cli.bench import _networks

    def chosen(**options):
        given = dict(networks=None, shapes=("all",), quick=False, layers=None, device="cpu", dtype="float32")
        return _networks(SimpleNamespace(**{**given, **options}))

    everything = [name for name in NETWORKS if name != "tiny"]
    assert chosen() == chosen(networks=["all"], shapes=["resnet50"]) == everything
    assert chosen(shapes=["resnet50"]) == chosen(quick=True) == chosen(device="cuda") == chosen(networks=["none"]) == []
    assert chosen(networks=["tiny", "resnet50"], quick=True) == ["resnet50", "tiny"]


def test_networks_compile_frozen(monkeypatch):
    """The other baseline, without a C++ compiler: parameters are frozen when the graph is made."""
    seen, right = [], torch.compile

    def watched(module, **options):
        from torch._inductor import config

        seen.append(config.freezing)
        return right(module, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", watched)
    with torch.no_grad():
        bench = NetworkBench("tiny", 1, (0.5,), "blob", 64)
        made, seconds, why = bench.compile()
        assert why is None and seconds > 0 and seen == [True]
        assert torch.equal(made(), bench.network(bench.input))
        monkeypatch.setattr(torch, "compile", lambda module, **options: lambda x: module(x) + 1)
        assert bench.compile()[2] == "torch.compile gives another result"


def test_the_readme_shows_networks_first(tmp_path):
    from test_cli import ROOT, script

    readme, folder = script("readme"), ROOT / "benchmarks" / "results" / "intel-xeon-sapphire-rapids-2-threads"
    of = lambda milliseconds: {"median": milliseconds}
    row = {
        "batch": 4,
        "asked": 0.5,
        "failure": None,
        "dense": of(20),
        "sparse": of(11),
        "automatic": of(10),
        "ratio": 2,
    }
    rows = [row | {"network": name, "compiled": None} for name in readme.NETWORKS]
    record = {
        "environment": {"cpu": "A CPU", "threads": 2}, "networks": [rows[0] | {"compiled": of(15)}, *rows[1:]],
        "summary": {"networks": {"bar": "the bar", "rows": 7, "below": 2, "noise": 1}},
    }  # fmt: skip
    (tmp_path / "networks.json").write_text(json.dumps(record))
    lines = readme.network_section(tmp_path / "networks.json", "here")
    assert "| ResNet-50 | 4 | 0.5 | 20.0 ms | 15.0 ms | 11.0 ms | 10.0 ms | 2.00× | 1.50× |" in lines
    assert "| MobileNetV2 | 4 | 0.5 | 20.0 ms |  | 11.0 ms | 10.0 ms | 2.00× |  |" in lines
    text = " ".join(lines)
    assert "Of 7 blocks and layers within these passes 2 are slower than the bar (the bar);" in text
    assert "so are 1 of dense itself, measured once more ([all of them](here/networks.json))." in text
    assert set(readme.NETWORKS) == {name for name in NETWORKS if name != "tiny"}
    assert readme.section(folder / "bench.json").startswith("## Whole networks\nWhole networks in inference")
