"""CSV and TSV: the header names the columns, every value is text as it stands there."""

import csv

import pytest
from odd_files import PACK, found, put, read

from cordee.errors import UserError

READ = {
    "plain": (b"a,b\n1,x\n2,y\n", [("line 2", {"a": "1", "b": "x"}), ("line 3", {"a": "2", "b": "y"})]),
    "of an editor": (b"\xef\xbb\xbfa,b\r\n1,x\r\n", [("line 2", {"a": "1", "b": "x"})]),
    "quotes": (b'a,"b, c"\n"say ""hi""",\'x\'\n', [("line 2", {"a": 'say "hi"', "b, c": "'x'"})]),
    "line ends in fields": (
        b'a,b\n"one\n\ntwo",1\n"three\r\nfour",2\n',
        [("line 2", {"a": "one\n\ntwo", "b": "1"}), ("line 5", {"a": "three\r\nfour", "b": "2"})],
    ),
    "nothing is guessed": (
        b"a,b,c\n007,,NA\n1e3, x ,null\n",
        [("line 2", {"a": "007", "b": "", "c": "NA"}), ("line 3", {"a": "1e3", "b": " x ", "c": "null"})],
    ),
    "blank lines": (b"a,b\n\n1,2\n\n\n3,4", [("line 3", {"a": "1", "b": "2"}), ("line 6", {"a": "3", "b": "4"})]),
    "one column": (b"text\nhello; you\n", [("line 2", {"text": "hello; you"})]),
    "semicolons": (b"text;n\na,b;1,5\n", [("line 2", {"text": "a,b", "n": "1,5"})]),
    "a column without a name": (b",text\n0,hi\n", [("line 2", {"column 1": "0", "text": "hi"})]),
    "a quote within": (b'a,b\n5" pipe,x\n', [("line 2", {"a": '5" pipe', "b": "x"})]),
    "header only": (b"a,b\n", []),
    "fields": (
        b"a,b\n1\n1,2,3\n1,2\n",
        [
            ("line 2", "not the 2 fields of the header"),
            ("line 3", "not the 2 fields of the header"),
            ("line 4", {"a": "1", "b": "2"}),
        ],
    ),
    "no UTF-8": (b"a,b\nZ\xfcrich,1\nBern,2\n", [("line 2", "no UTF-8"), ("line 3", {"a": "Bern", "b": "2"})]),
}


@pytest.mark.parametrize("name", READ)
def test_csv_is_read_as_it_stands_there(tmp_path, name):
    content, rows = READ[name]
    (tmp_path / "a.csv").write_bytes(content)
    assert found(tmp_path / "a.csv") == rows


def test_tsv_is_read_by_tabs_alone(tmp_path):
    put(tmp_path, {"a.tsv.gz": PACK["gz"](b'a,b\tc;d\n1,"2"\t"3\n4"\n'), "b.tsv": b"text,more\nhello, you\n"})
    assert found(tmp_path / "a.tsv.gz") == [("line 2", {"a,b": '1,"2"', "c;d": "3\n4"})]
    assert found(tmp_path / "b.tsv") == [("line 2", {"text,more": "hello, you"})]


WRONG = {
    "two columns": (b"a,b,a\n1,2,3\n", "has two columns 'a'; 0 rows were read before"),
    "a quote that does not end": (b'a,b\n1,2\n"x,3\n4,5\n', "no CSV in line 3: unexpected end of data; 1 row was"),
    "more behind a quote": (b'a,b\n1,2\n"x"y,3\n', "no CSV in line 3: ',' expected after '\"'; 1 row was read before"),
    "a header that is no UTF-8": (b"a,\xff\n1,2\n", "the names of the columns are no UTF-8; 0 rows were read before"),
}


@pytest.mark.parametrize("name", WRONG)
def test_csv_of_which_the_rest_has_no_meaning_is_one_line(tmp_path, name):
    content, told = WRONG[name]
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(tmp_path / "a.csv")
    assert f"{tmp_path}/a.csv: data: can't be read to its end: {told}" in str(caught.value)


def test_a_field_may_be_longer_than_the_modules_limit(tmp_path):
    (tmp_path / "a.csv").write_text(f'text,n\n"{"word " * 100_000}",1\n')
    assert len(read(tmp_path / "a.csv")[0].values["text"]) == 500_000


def test_what_pythons_module_writes_is_read_again(tmp_path):
    fields = ["", '"', '""', "a,b", "a\nb", "a\r\nb", " x ", "'", "é\U0001f600", "\t", "1", "x;y"]
    rows = [{"a": one, "b": other} for one in fields for other in fields]
    for suffix, dialect in (("csv", "excel"), ("csv", "unix"), ("tsv", "excel-tab")):
        with (tmp_path / f"a.{suffix}").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["a", "b"], dialect=dialect)
            writer.writeheader()
            writer.writerows(rows)
        assert [row.values for row in read(tmp_path / f"a.{suffix}")] == rows
