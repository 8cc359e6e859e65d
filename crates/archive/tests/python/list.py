"""Prints what Python's tarfile makes of each archive: one line of JSON, an error or the entries.

An entry is its name in hexadecimal, its type flag, its size and what it links to, in hexadecimal.
"""
import json
import sys
import tarfile


def listing(path):
    entries = []
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name, link = (text.encode("utf-8", "surrogateescape").hex() for text in (member.name, member.linkname))
                entries.append([name, member.type.decode("latin-1"), member.size, link])
    except Exception as error:  # Whatever it is: it did not read the archive.
        return {"error": f"{type(error).__name__}: {error}", "entries": entries}
    return {"error": None, "entries": entries}


for path in sys.argv[1:]:
    print(json.dumps(listing(path)))
