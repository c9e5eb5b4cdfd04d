"""Reads exported files as other programs do, with Python's standard library, and prints them as JSON.

    formats.py csv FILE     a list of rows, each an object of its cells
    formats.py xlsx FILE    a list of sheets: name, frozen rows, filter, and rows of cells; a cell is
                            [kind, value, format], kind one of text, number, flag
"""

import csv
import json
import re
import sys
import xml.etree.ElementTree as xml
import zipfile

MAIN = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"


def read_csv(path):
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file, strict=True))


def unescaped(text):
    return re.sub("_x([0-9A-F]{4})_", lambda found: chr(int(found[1], 16)), text)


def cell(element, formats, bold):
    kind = element.get("t", "n")
    style = int(element.get("s", "0"))
    form = "bold" if style in bold else formats[style]
    if kind == "inlineStr":
        return ["text", unescaped("".join(element.itertext())), form]
    assert element.find(MAIN + "f") is None, "no cell is a formula"
    value = element.find(MAIN + "v").text
    return ["flag", value == "1", form] if kind == "b" else ["number", float(value), form]


def column(reference):
    number = 0
    for letter in re.match("[A-Z]+", reference)[0]:
        number = number * 26 + ord(letter) - ord("A") + 1
    return number - 1


def read_xlsx(path):
    archive = zipfile.ZipFile(path)
    assert archive.testzip() is None
    styles = xml.fromstring(archive.read("xl/styles.xml"))
    codes = {f.get("numFmtId"): f.get("formatCode") for f in styles.iter(MAIN + "numFmt")}
    fonts = [f.find(MAIN + "b") is not None for f in styles.find(MAIN + "fonts")]
    xfs = list(styles.find(MAIN + "cellXfs"))
    formats = [codes.get(xf.get("numFmtId")) for xf in xfs]
    bold = {i for i, xf in enumerate(xfs) if fonts[int(xf.get("fontId"))]}
    book = xml.fromstring(archive.read("xl/workbook.xml"))
    sheets = []
    for number, sheet in enumerate(book.find(MAIN + "sheets"), 1):
        root = xml.fromstring(archive.read(f"xl/worksheets/sheet{number}.xml"))
        pane = root.find(f"{MAIN}sheetViews/{MAIN}sheetView/{MAIN}pane")
        rows = []
        for row in root.find(MAIN + "sheetData"):
            cells = {column(c.get("r")): cell(c, formats, bold) for c in row}
            rows.append([cells.get(i) for i in range(max(cells, default=-1) + 1)])
        sheets.append({
            "name": sheet.get("name"),
            "frozen": int(pane.get("ySplit")),
            "filter": root.find(MAIN + "autoFilter").get("ref"),
            "rows": rows,
        })
    return sheets


kind, path = sys.argv[1:]
json.dump({"csv": read_csv, "xlsx": read_xlsx}[kind](path), sys.stdout)
