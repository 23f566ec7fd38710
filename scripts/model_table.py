"""The README's table of models: parameters and multiply-adds, counted, beside the published accuracy.

    python scripts/model_table.py            # print the table
    python scripts/model_table.py --write    # put it into README.md
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from config import get_config, image_size  # noqa: E402
from models import build_model  # noqa: E402
from utils.profiling.step_speed import multiply_adds  # noqa: E402

# Name shown and the authors' ImageNet-1k top-1 in percent; 22k: pre-trained on ImageNet-22k. None: nothing was published.
PUBLISHED: dict[str, tuple[str, str | None]] = {
    "crossformer_t": ("CrossFormer-T", "81.5"), "crossformer_s": ("CrossFormer-S", "82.5"), "crossformer_b": ("CrossFormer-B", "83.4"),
    "crossformer_l": ("CrossFormer-L", "84.0"), "crossformer_pp_s": ("CrossFormer++-S", "83.2"),
    "crossformer_pp_b": ("CrossFormer++-B", "84.2"), "crossformer_pp_l": ("CrossFormer++-L", "84.7"),
    "crossformer_pp_h": ("CrossFormer++-H", "84.9"), "swin_t": ("Swin-T", "81.2"), "swin_s": ("Swin-S", "83.2"),
    "swin_b": ("Swin-B", "83.5"), "swin_b_384": ("Swin-B, 384", "84.5"), "swin_l": ("Swin-L", "86.3 (22k)"),
    "swinv2_t": ("SwinV2-T", "81.8"), "swinv2_s": ("SwinV2-S", "83.7"), "swinv2_b": ("SwinV2-B", "84.2"),
    "swin_mlp_t_c24": ("SwinMLP-T, c24", "79.4"), "swin_mlp_t_c12": ("SwinMLP-T, c12", "79.6"), "swin_mlp_t_c6": ("SwinMLP-T, c6", "79.7"),
    "swin_mlp_b": ("SwinMLP-B", "81.3"), "cvt_13": ("CvT-13", "81.6"),
    "cvt_21": ("CvT-21", "82.5"), "cvt_13_384": ("CvT-13, 384", "83.0"), "cvt_21_384": ("CvT-21, 384", "83.3"),
    "cvt_w24_384": ("CvT-W24, 384", "87.6 (22k)"), "shunted_t": ("Shunted-T", "79.8"), "shunted_s": ("Shunted-S", "82.9"),
    "shunted_b": ("Shunted-B", "84.0"), "mpvit_t": ("MPViT-T", "78.2"), "mpvit_xs": ("MPViT-XS", "80.9"), "mpvit_s": ("MPViT-S", "83.0"),
    "mpvit_b": ("MPViT-B", "84.3"), "pvt_t": ("PVT-Tiny", "75.1"), "pvt_s": ("PVT-Small", "79.8"), "pvt_m": ("PVT-Medium", "81.2"),
    "pvt_l": ("PVT-Large", "81.7"), "pvt_v2_b0": ("PVTv2-B0", "70.5"), "pvt_v2_b1": ("PVTv2-B1", "78.7"), "pvt_v2_b2": ("PVTv2-B2", "82.0"),
    "pvt_v2_b2_li": ("PVTv2-B2-Li", "82.1"), "pvt_v2_b3": ("PVTv2-B3", "83.1"), "pvt_v2_b4": ("PVTv2-B4", "83.6"),
    "pvt_v2_b5": ("PVTv2-B5", "83.8"), "galerkin_t": ("Galerkin-T", None), "galerkin_s": ("Galerkin-S", None),
    "galerkin_b": ("Galerkin-B", None),
}
# Configs whose model is compared with the authors' outputs by a test, and the file of those outputs; the other variants of a family
# are the same code with other numbers, their parameter names, shapes and counts compared.
COMPARED = {
    "crossformer_t": "crossformer_tiny", "crossformer_b": "crossformer_base", "crossformer_pp_s": "crossformer_pp_small",
    "swin_t": "swin_tiny", "cvt_13": "cvt_13", "shunted_t": "shunted_t", "mpvit_t": "mpvit_tiny", "pvt_t": "pvt_tiny",
    "pvt_v2_b1": "pvt_v2_b1", "galerkin_t": "galerkin_attention",
}
HEAD = ("| model | config | size | parameters | GMACs | published top-1 | compared |", "|---|---|---|---|---|---|---|")
BEGIN, END = "<!-- models -->", "<!-- end of models -->"


def count(name: str) -> tuple[int, float, tuple[int, int]]:
    """(parameters, multiply-adds of one image / 1e9, input size) of a config's model, without computing anything."""
    config = get_config(str(ROOT / "configs" / f"{name}.yaml"))
    with torch.device("meta"):
        model = build_model(config)
    return sum(p.numel() for p in model.parameters()), multiply_adds(model, image_size(config)) / 1e9, image_size(config)


def compared(name: str) -> str:
    """What a test compares with the authors' code."""
    if name.startswith("galerkin"):
        return "attention" if name in COMPARED else "same code"
    return "outputs" if name in COMPARED else "names, counts"


def rows() -> list[str]:
    """The table's lines, its head included."""
    lines = list(HEAD)
    for name, (shown, top1) in PUBLISHED.items():
        parameters, gmacs, (height, _) = count(name)
        lines.append(f"| {shown} | `{name}` | {height} | {parameters / 1e6:.1f} M | {gmacs:.2f} | {top1 or '-'} | {compared(name)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the table in README.md")
    table = "\n".join(rows())
    if not parser.parse_args().write:
        print(table)
        return
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
