"""Turn a published checkpoint into clean safetensors: the model's weights and nothing else.

    python scripts/convert_weights.py official.pth clean.safetensors

Reads what --pretrained reads, without running code from the file; --pretrained and timm take the result.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a .pth, .pt or .safetensors file")
    parser.add_argument("target", help="the .safetensors file to write")
    args = parser.parse_args()

    from safetensors.torch import save

    from config import ConfigError
    from models.safe_load import CheckpointError
    from models.weights import read_state_dict
    from utils.loggers.console import plain
    from utils.runtime.files import replace_file, require_outputs

    if not args.target.endswith(".safetensors"):
        print(f"error: {args.target}: the target ends in .safetensors", file=sys.stderr)
        return 2
    try:
        require_outputs([("target", args.target)], [args.source])
        state = read_state_dict(args.source)
        # Names of one tensor (shared modules) become tensors of their own: the format knows no aliases.
        replace_file(args.target, save({name: tensor.clone().contiguous() for name, tensor in state.items()}))
    except (ConfigError, CheckpointError) as error:
        print(f"error: {plain(error)}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        print(f"error: {args.target}: cannot be written ({error.strerror})", file=sys.stderr)
        return 1
    print(f"wrote {args.target}: {len(state)} tensors, {sum(t.numel() for t in state.values()) / 1e6:.2f} M numbers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
