"""Every YAML file in configs/ builds the model that it and the README name."""

from __future__ import annotations

import re

import model_table
import pytest
import torch
from conftest import ROOT

from config import get_config
from models import build_model

# Exact parameter counts of the published variants.
PARAMETERS = {
    "crossformer_t": 27_776_794, "crossformer_s": 30_657_394, "crossformer_b": 51_971_554, "crossformer_l": 91_971_184,
    "crossformer_pp_s": 23_325_340, "crossformer_pp_b": 51_994_594, "crossformer_pp_l": 92_001_904, "crossformer_pp_h": 95_962_944,
    "swin_t": 28_288_354, "swin_s": 49_606_258, "swin_b": 87_768_224, "swin_b_384": 87_903_584, "swin_l": 196_532_476,
    "swinv2_t": 28_347_154, "swin_mlp_t_c24": 20_386_632, "swin_mlp_t_c12": 21_152_072,
    "swin_mlp_t_c6": 22_682_952, "swin_mlp_b": 60_659_416,
    "cvt_13": 19_997_480, "cvt_21": 31_622_696, "cvt_13_384": 19_997_480, "cvt_21_384": 31_622_696, "cvt_w24_384": 277_196_392,
    "shunted_t": 11_553_576, "shunted_s": 22_401_256, "shunted_b": 39_614_376, "mpvit_t": 5_843_736, "mpvit_xs": 10_573_448,
    "mpvit_s": 22_892_400, "mpvit_b": 74_845_976, "pvt_t": 13_229_288, "pvt_s": 24_485_864, "pvt_m": 44_208_104, "pvt_l": 61_369_320,
    "pvt_v2_b0": 3_666_760, "pvt_v2_b1": 14_009_000, "pvt_v2_b2": 25_362_856, "pvt_v2_b2_li": 22_553_512, "pvt_v2_b3": 45_238_696,
    "pvt_v2_b4": 62_556_072, "pvt_v2_b5": 81_956_008,
}
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_each_variant_has_a_file_and_a_row() -> None:
    files = {path.stem for path in (ROOT / "configs").glob("*.yaml")} - {"quickstart", "timm"}
    assert files == set(model_table.PUBLISHED) and set(PARAMETERS) <= files
    assert re.findall(r"^\| \S.* \| `(\w+)` \|", README, re.M) == list(model_table.PUBLISHED)


@pytest.mark.parametrize("name", model_table.PUBLISHED)
def test_config_builds_its_model(name: str) -> None:
    path = ROOT / "configs" / f"{name}.yaml"
    config = get_config(str(path))
    with torch.device("meta"):
        model = build_model(config)
    count = sum(p.numel() for p in model.parameters())
    assert count == PARAMETERS.get(name, count)
    row = re.search(rf"^\| (.*) \| `{name}` \| (\d+) \| ([\d.]+) M \| ([\d.]+) \| ([^|]*) \| (.*) \|$", README, re.M)
    shown, top1 = model_table.PUBLISHED[name]
    assert row.groups() == (shown, str(config.DATA.IMG_SIZE), f"{count / 1e6:.1f}", row[4], top1 or "-", model_table.compared(name))
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert f"main.py --cfg configs/{name}.yaml" in head and (top1 is None or top1.split()[0] in head)
    assert "model_table" not in head


def test_compared_means_that_there_are_reference_outputs() -> None:
    for reference in model_table.COMPARED.values():
        assert (ROOT / "tests/reference" / f"{reference}.npz").exists()
        assert any(reference in path.read_text(encoding="utf-8") for path in (ROOT / "tests/models").glob("test_*.py"))


@pytest.mark.parametrize("name", ["crossformer_t", "pvt_v2_b0"])
def test_the_readmes_gmacs_are_counted(name: str) -> None:
    _, gmacs, _ = model_table.count(name)
    assert re.search(rf"`{name}` \| .* \| {gmacs:.2f} \|", README)
