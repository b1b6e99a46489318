import json

import numpy as np
import pytest

from playbook_optax.analysis.findings import Finding, by_severity


def finding(severity="info", **evidence):
    return Finding("code", severity, "It is so.", evidence, "A section", "Do this.")


def test_evidence_becomes_strict_json():
    made = finding(
        n=np.int64(3),
        x=np.float32(0.5),
        nan=float("nan"),
        inf=np.inf,
        flag=np.True_,
        rows=np.arange(3),
        nested={1: (1, None)},
    )
    assert json.loads(json.dumps(made.to_dict(), allow_nan=False))["evidence"] == {
        "n": 3,
        "x": 0.5,
        "nan": "nan",
        "inf": "inf",
        "flag": True,
        "rows": [0, 1, 2],
        "nested": {"1": [1, None]},
    }


def test_evidence_that_json_cannot_hold_is_an_error_with_its_path():
    with pytest.raises(ValueError, match=r"evidence\['rows'\]\[1\].*cannot be stored as JSON"):
        finding(rows=[1, object()])


def test_unknown_severity_names_the_nearest():
    with pytest.raises(ValueError, match="severity = 'warn' is unknown: did you mean 'warning'"):
        finding("warn")


def test_text_is_one_line_for_a_terminal():
    assert str(finding("warning")) == "warning: It is so. Do this. [code; A section]"


def test_order_is_by_severity_and_stable():
    rows = [finding("info", n=0), finding("error", n=1), finding("info", n=2), finding("warning")]
    ordered = by_severity(rows)
    assert [f.severity for f in ordered] == ["error", "warning", "info", "info"]
    assert [f.evidence["n"] for f in ordered if f.severity == "info"] == [0, 2]
