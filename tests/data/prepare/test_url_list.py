import gzip
import os
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest

from mdm_models.data.prepare.url_list import UrlList

ROWS = [("http://host/0.jpg", 'a "quoted", old cat'), ("https://host/1.jpg", "2 dogs"), ("http://host/2.jpg", "crème")]


def test_cc12m_has_urls_and_captions_without_a_header(tmp_path):
    path = tmp_path / "cc12m.tsv"
    path.write_text("".join(f"{url}\t{caption}\n" for url, caption in ROWS))
    assert list(UrlList(path)) == ROWS
    assert UrlList(path).estimated_rows() == 3


def test_cc3m_has_its_captions_first(tmp_path):
    path = tmp_path / "Train_GCC-training.tsv"
    path.write_text("".join(f"{caption}\t{url}\n" for url, caption in ROWS))
    assert list(UrlList(path)) == ROWS


def test_webvid_has_its_urls_in_contentUrl_and_its_captions_in_name(tmp_path):
    path = tmp_path / "results_2M_train.csv"
    lines = ["videoid,contentUrl,duration,page_dir,name"]
    lines += ["21179416,https://host/a.mp4,PT00H00M11S,006001_006050,Aerial shot winter forest"]
    lines += ['5629184,https://host/b.mp4,PT00H00M29S,071501_071550,"Senior couple, looking through binoculars"']
    path.write_text("\n".join(lines) + "\n")
    assert list(UrlList(path)) == [
        ("https://host/a.mp4", "Aerial shot winter forest"),
        ("https://host/b.mp4", "Senior couple, looking through binoculars"),
    ]
    assert UrlList(path).estimated_rows() == 2


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "cp1252"])
def test_a_list_may_be_in_any_encoding_of_a_spreadsheet(tmp_path, encoding):
    path = tmp_path / "a.csv"
    path.write_bytes("url,caption\r\nhttp://host/a.jpg,crème\r\n".encode(encoding))
    assert list(UrlList(path)) == [("http://host/a.jpg", "crème")]


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.csv")
    with pytest.raises(ValueError, match=r"a.csv is no file but a folder, a pipe or a device"):
        UrlList(tmp_path / "a.csv")


def test_a_quoted_caption_may_have_several_lines(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('url,caption\nhttp://host/a.jpg,"one\ntwo"\nhttp://host/b.jpg,three\n')
    assert [caption for _, caption in UrlList(path)] == ["one\ntwo", "three"]


def test_a_single_quote_mark_in_a_tsv_swallows_nothing(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('http://host/a.jpg\t"unclosed\nhttp://host/b.jpg\tb\n')
    assert [caption for _, caption in UrlList(path)] == ['"unclosed', "b"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'url;caption\nhttp://host/a.jpg;"one; two, three"\n'),
        ("a.csv", "sep=;\r\nurl;caption\r\nhttp://host/a.jpg;\"one; two, three\"\r\n"),
        ("a.csv", "url\tcaption\nhttp://host/a.jpg\tone; two, three\n"),
        ("a.tsv", 'url,caption\nhttp://host/a.jpg,"one; two, three"\n'),
        ("A.CSV", 'URL,Caption\nhttp://host/a.jpg,"one; two, three"\n'),
        ("a.csv", 'url,caption,caption\nhttp://host/a.jpg,"one; two, three",other\n'),
    ],
)
def test_a_table_may_be_written_as_spreadsheets_do(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text.encode())
    assert list(UrlList(path)) == [("http://host/a.jpg", "one; two, three")]


def test_a_column_that_is_named_decides_what_stands_between_fields(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("link;what\nhttp://host/a.jpg;one, two\n")
    assert list(UrlList(path, "link", "what")) == [("http://host/a.jpg", "one, two")]


def test_a_list_that_is_not_compressed_as_its_name_says_is_named(tmp_path):
    path = tmp_path / "cc12m.tsv.gz"
    path.write_text("http://host/a.jpg\tone\n")
    with pytest.raises(ValueError, match=r"cc12m\.tsv\.gz is damaged"):
        UrlList(path)


def test_a_compressed_index_is_read(tmp_path):
    path = tmp_path / "cc12m.tsv.gz"
    path.write_bytes(gzip.compress("".join(f"{url}\t{caption}\n" for url, caption in ROWS).encode()))
    assert list(UrlList(path)) == ROWS


def test_parquet_is_read_by_its_columns(tmp_path):
    path = tmp_path / "a.parquet"
    url, caption = zip(*ROWS, strict=True)
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2, 3], "TEXT": caption, "URL": url}), path)
    assert list(UrlList(path)) == ROWS
    assert UrlList(path).estimated_rows() == 3


def test_columns_can_be_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("url,link,caption,alt\nx,http://host/a.jpg,y,an apple\n")
    assert list(UrlList(path, "link", "alt")) == [("http://host/a.jpg", "an apple")]


def test_a_missing_field_is_empty(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("http://host/a.jpg\ta\nhttp://host/b.jpg\n")
    assert list(UrlList(path))[1] == ("http://host/b.jpg", "")


def test_an_index_is_read_as_it_is_needed(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text(f"http://host/a.jpg\t{120 * 'a'}\n" * 20_000)
    tracemalloc.start()
    count = sum(1 for _ in UrlList(path))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 20_000
    assert most < path.stat().st_size / 10


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{}", "a list of URLs is a .tsv, .csv or .parquet file"),
        ("a.csv", "id,caption\n1,a\n", "no column for the url among id, caption; name it by --url-column"),
        ("a.csv", "url,id\nhttp://host,1\n", "no column for the caption"),
        ("a.tsv", "", "no column for the url among none"),
        ("a.tsv", "http://host/a.jpg\ta\tb\n", "a URL and a caption a line"),
        ("a.parquet", "not parquet", "a.parquet is not a Parquet file"),
    ],
)
def test_an_index_that_cannot_be_understood_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        UrlList(tmp_path / name)


def test_a_compressed_index_that_breaks_off_is_named(tmp_path):
    path = tmp_path / "a.tsv.gz"
    path.write_bytes(gzip.compress(b"http://host/a.jpg\ta\n" * 1000)[:-9])
    url_list = UrlList(path)
    with pytest.raises(ValueError, match=r"a.tsv.gz is damaged"):
        list(url_list)
    with pytest.raises(ValueError, match=r"a.tsv.gz is damaged"):
        url_list.estimated_rows()


def test_another_index_of_the_same_name_is_told_apart(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("http://host/a.jpg\ta\n")
    before = UrlList(path).fingerprint()
    path.write_text("http://host/b.jpg\tb\n")
    assert UrlList(path).fingerprint() != before
