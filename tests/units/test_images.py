"""Images of records: which file a value means, and what is refused before it is decoded."""

import base64
import io
import os
import struct
import sys
import zlib

import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from common.error import BouquetError
from common.models import base, lengths
from common.sources.dealing import stored
from common.sources.fields import LeftOut
from common.sources.images import MOST_BYTES, ImageFile, images, made_up
from strategies import read_config

SIZE = (40, 30)


def content(form="PNG", size=SIZE, colour=(200, 30, 30), **options):
    Image.new("RGB", size, colour).save(file := io.BytesIO(), form, **options)
    return file.getvalue()


def url(data):
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


@pytest.fixture
def folder(tmp_path):
    """The folder of a data file, with images in it and, beside it, one that is none of its."""
    data = tmp_path / "data"
    (data / "deep").mkdir(parents=True)
    for place in (data / "own.png", data / "deep/own.png", tmp_path / "foreign.png"):
        place.write_bytes(content())
    (data / "out.png").symlink_to(tmp_path / "foreign.png")
    (data / "within.png").symlink_to(data / "own.png")
    (data / "beyond").symlink_to(tmp_path)
    return data


def test_an_image_is_a_file_of_the_folder_or_one_in_the_record(folder):
    within = ["own.png", "deep/../own.png", "deep/own.png", "within.png", str(folder / "own.png")]
    written = [url(content()), content(), {"bytes": content("JPEG"), "path": "/gone.jpg"}]
    for value in [*within, *written]:
        (image,) = images(value, "image", folder)
        assert image.size == image.open().size == SIZE
        assert image.open().mode == "RGB"
    assert [image.file for image in images(["own.png", "deep/own.png"], "image", folder)] == [
        folder / "own.png",
        folder / "deep/own.png",
    ]


@pytest.mark.parametrize("path", ["../foreign.png", "out.png", "beyond/foreign.png", "deep/../../foreign.png", "/"])
def test_a_path_that_leaves_the_folder_is_refused(folder, path):
    with pytest.raises(BouquetError, match=r"an image outside the data's folder .field 'image'.*a path within"):
        images(path, "image", folder)
    with pytest.raises(BouquetError, match="an image outside the data's folder"):
        images(str(folder.parent / "foreign.png"), "image", folder)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("gone.png", "FileNotFoundError"),
        ("a\0b.png", "ValueError"),
        ("x" * 5000, "OSError"),
        ("https://example.org/own.png", "FileNotFoundError"),
        ("deep", "'deep', which is not a file"),
        ("pipe", "'pipe', which is not a file"),
        ("round", "'round' "),
        ("data:image/png,raw", "a data URL that cannot be read .invalid base64"),
        ("data:image/png;base64,?", "a data URL that cannot be read"),
        (7, "got int"),
        ({"path": "own.png"}, "an object without bytes"),
    ],
)
def test_what_is_no_image_is_told_by_what_it_is(folder, value, said):
    os.mkfifo(folder / "pipe")
    (folder / "round").symlink_to(folder / "round")
    with pytest.raises(BouquetError, match=f"a field does not hold an image .field 'photo'.*{said}.*task.image"):
        images(value, "photo", folder)


def test_data_in_no_folder_have_no_paths():
    with pytest.raises(BouquetError, match="a path, in data that is not in a folder"):
        images("own.png", "image", None)
    assert images(url(content()), "image", None)[0].size == SIZE


@pytest.mark.parametrize("value", [None, "", b"", [], ["own.png", None]])
def test_a_record_without_an_image_is_left_out(folder, value):
    with pytest.raises(LeftOut, match="without an image"):
        images(value, "image", folder)


def bomb(width, height):
    """A PNG of a few bytes that says that it is so large."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (bomb(60_000, 60_000), "an image cannot be read .* DecompressionBombError"),
        (bomb(9_000, 9_000), "an image is too large .* at most 67,108,864 pixels, got 9,000 x 9,000"),
        (bomb(30_000, 100), "an aspect ratio of at most 100, got 30,000 x 100"),
        (content()[:60], "an image cannot be read .* one of JPEG, PNG, WEBP, GIF, BMP"),
        (bomb(40, 30), "an image cannot be read"),
        (b"\xff\xd8\xff" + b"\0" * 40, "an image cannot be read"),
        (content("TIFF"), "an image cannot be read"),
        (content("EPS"), "an image cannot be read"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an image cannot be read"),
    ],
)
def test_what_cannot_be_decoded_within_bounds_is_refused(folder, data, said):
    (folder / "own.png").write_bytes(data)
    for image in (ImageFile(content=data), ImageFile(folder / "own.png")):
        with pytest.raises(BouquetError, match=said):
            image.open()
        with pytest.raises(BouquetError, match=said):
            _ = image.size


def test_a_file_or_a_text_of_too_many_bytes_is_not_read(folder):
    os.truncate(folder / "own.png", MOST_BYTES + 1)
    with pytest.raises(BouquetError, match=f"at most {MOST_BYTES:,} bytes, got {MOST_BYTES + 1:,}"):
        ImageFile(folder / "own.png").open()
    with pytest.raises(BouquetError, match=f"an image is too large .field 'image'.* {MOST_BYTES:,} bytes"):
        images(b"\0" * (MOST_BYTES + 1), "image", folder)


def test_a_file_that_has_gone_or_changed_is_looked_at_again(folder):
    image = ImageFile(folder / "own.png")
    assert image.size == SIZE
    image.file.write_bytes(content(size=(50, 50)))
    assert image.size == (50, 50)
    image.file.unlink()
    with pytest.raises(BouquetError, match=r"an image cannot be read .*own.png"):
        _ = image.size


def test_whatever_the_form_it_is_upright_rgb():
    red, green = (Image.new("RGB", (4, 2), colour) for colour in ("red", "green"))
    red.save(moving := io.BytesIO(), "GIF", save_all=True, append_images=[green])
    assert ImageFile(content=moving.getvalue()).open().getpixel((0, 0)) == (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # held on its side
    assert ImageFile(content=content("JPEG", exif=exif)).size == SIZE[::-1]
    for mode in ("L", "P", "RGBA", "1", "LA"):
        red.convert(mode).save(file := io.BytesIO(), "PNG", **({"transparency": b"\0"} if mode == "P" else {}))
        opened = ImageFile(content=file.getvalue()).open()
        assert (opened.mode, opened.size) == ("RGB", (4, 2))


def test_made_up_images_differ_and_are_always_the_same():
    assert made_up(1) == made_up(1) != made_up(2)
    assert made_up(1).size == (32, 32)


def test_a_hubs_images_come_as_their_files_stood():
    """Decoded by the data set they would be so before any bound is looked at, and no two of one text."""
    data = [{"bytes": content(), "path": "own.png"}]
    features = Features({"image": ImageFeature(), "text": Value("string")})
    (record,) = stored(Dataset.from_dict({"image": data, "text": ["a"]}, features=features))
    assert record["image"]["bytes"] == content()
    assert images(record["image"], "image", None)[0].size == SIZE


def test_without_pillow_the_cure_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    config = read_config({"task.name": "vision"})
    base.load_processor.cache_clear()
    with pytest.raises(
        BouquetError, match=r"the library that reads images is not installed .*Pillow. pip install 'bouquet\[vision\]'"
    ):
        lengths.widest(config)
