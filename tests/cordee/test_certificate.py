"""A certificate exists only where every check passed, and a damaged one is one line."""

import pytest

from cordee import certificate
from cordee.certificate import Certificate, Check, at_least, at_most
from cordee.errors import Fault


def proven(*checks: Check) -> Certificate:
    return Certificate(proof="flow", of="toys.spring", claim="water flows down", checks=checks, evidence={"seen": 3})


def test_what_is_written_is_read_again(tmp_path):
    of = proven(at_most("drops uphill", 0, 0), at_least("share downhill", 0.75, 0.5))
    certificate.write(tmp_path, of)
    assert certificate.read(tmp_path) == of


@pytest.mark.parametrize("value", [2.0, float("nan"), float("inf")])
def test_a_failed_check_leaves_no_certificate_and_all_that_failed_are_named(tmp_path, value):
    checks = at_most("drops uphill", value, 1), at_least("share", 0, 1), at_most("x", 0, 0)
    with pytest.raises(Fault, match=r"flow is not proven: drops uphill is .* \(limit 1\); share is 0 \(limit at least"):
        certificate.write(tmp_path, proven(*checks))
    assert list(tmp_path.iterdir()) == []


def test_a_proof_without_checks_proves_nothing(tmp_path):
    with pytest.raises(Fault, match="flow is not proven: nothing was checked"):
        certificate.write(tmp_path, proven())


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"proof": 3}', '{"proof": "a", "of": "b", "claim": "c", "checks": [{"name": "d"}]}']
)
def test_a_file_that_is_none_is_one_line(tmp_path, text):
    (tmp_path / certificate.NAME).write_text(text)
    with pytest.raises(Fault, match=r"certificate\.json"):
        certificate.read(tmp_path)
