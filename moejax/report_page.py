"""One HTML file from data and the parts in `assets/report`; it fetches nothing. No JAX.

Data are JSON in a script element that no browser executes. In it every `<` is escaped, so that no
text can end the element, and the page shows texts as text nodes only. A Content-Security-Policy
allows the page's own style and scripts by their hashes, and no connection at all.
"""

import base64
import hashlib
import json
import zlib
from importlib import resources
from typing import Any

import numpy as np

_SCRIPTS = ("charts.js", "report.js")
_DTYPES = {"u1": "uint8", "u2": "uint16", "u4": "uint32", "i2": "int16", "i4": "int32", "f4": ""}


def packed(array: np.ndarray) -> dict[str, Any]:
    """Returns an array for JSON: dtype (such as "u1"), shape, and base64 of deflated bytes.

    Whole numbers take the narrowest dtype that the page reads; others become float32.

    Raises:
        OverflowError: a whole number needs more than 32 bits.
    """
    array = np.asarray(array)
    dtype = _whole_dtype(array) if array.dtype.kind in "iub" else "f4"
    data = np.ascontiguousarray(array, dtype=f"<{dtype}").tobytes()
    return {"dtype": dtype, "shape": list(array.shape), "data": _deflated(data)}


def quantised(array: np.ndarray, low: float, high: float, levels: int = 255) -> dict[str, Any]:
    """Returns an array for JSON in `levels` equal steps from `low` to `high`, 0 being NaN.

    What lies outside is moved to the nearer end. The error is at most half a step,
    (high - low) / (levels - 1) / 2.
    """
    with np.errstate(invalid="ignore"):
        unit = (np.clip(np.asarray(array, np.float64), low, high) - low) / ((high - low) or 1.0)
        code = np.where(np.isnan(unit), 0, 1 + np.rint(unit * (levels - 1)))
    return packed(code.astype(np.int64)) | {"low": low, "high": high, "levels": levels}


def packed_json(value: Any) -> dict[str, Any]:
    """Returns JSON for JSON, deflated: for thousands of texts."""
    return {"dtype": "json", "data": _deflated(json.dumps(value, allow_nan=False).encode())}


def render(data: dict[str, Any]) -> str:
    """Returns the page that shows `data`, which JSON must be able to hold.

    Raises:
        ValueError: a number is not finite.
    """
    style, scripts = _asset("report.css"), [_asset(name) for name in _SCRIPTS]
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "POLICY": _policy(style, scripts),
        "STYLE": f"<style>{style}</style>",
        "SCRIPTS": "\n".join(f"<script>{script}</script>" for script in scripts),
        "DATA": f'<script type="application/json" id="data">{text}</script>',  # last: not searched
    }
    page = _asset("report.html")
    for name, part in parts.items():
        page = page.replace(f"<!-- {name} -->", part, 1)
    return page


def _whole_dtype(array: np.ndarray) -> str:
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    for dtype, name in _DTYPES.items():
        if name and np.iinfo(name).min <= low and high <= np.iinfo(name).max:
            return dtype
    raise OverflowError(f"whole numbers from {low} to {high} need more than 32 bits")


def _deflated(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 9)).decode("ascii")


def _asset(name: str) -> str:
    return resources.files("moejax").joinpath("assets", "report", name).read_text("utf-8")


def _policy(style: str, scripts: list[str]) -> str:
    def sources(texts: list[str]) -> str:
        digests = (hashlib.sha256(text.encode()).digest() for text in texts)
        return " ".join(f"'sha256-{base64.b64encode(d).decode('ascii')}'" for d in digests)

    return (
        f"default-src 'none'; script-src {sources(scripts)}; style-src {sources([style])}; "
        "img-src data:; connect-src 'none'; base-uri 'none'; form-action 'none'"
    )
