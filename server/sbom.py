"""Add the Debian packages of this system to a CycloneDX document, while an image is built.

usage: python sbom.py PYTHON_PACKAGES.cdx.json IMAGE.cdx.json

`cyclonedx-py` lists what pip installed; an image also consists of its base's packages. The result
is the same for the same packages: no time, no random serial number.
"""

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from packageurl import PackageURL

_FORMAT = "${Package}\t${Version}\t${Architecture}\n"


def debian_components(listing: str, distribution: str) -> list[dict[str, str]]:
    """CycloneDX components of Debian packages.

    Args:
        listing: a line per package: name, version and architecture, with tabs between.
        distribution: such as `debian-12`.
    """
    components = []
    for line in sorted(listing.splitlines()):
        name, version, architecture = line.split("\t")
        purl = PackageURL(
            "deb", "debian", name, version, {"arch": architecture, "distro": distribution}
        ).to_string()
        components.append(
            {"bom-ref": purl, "type": "library", "name": name, "version": version, "purl": purl}
        )
    return components


def main(source: Path, target: Path) -> None:
    """Read the document of the Python packages, and write that of the image."""
    document: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
    document["metadata"]["component"]["type"] = "container"
    listing = subprocess.run(
        ["dpkg-query", "--show", "--showformat", _FORMAT],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    system = platform.freedesktop_os_release()
    document["components"] += debian_components(listing, f"{system['ID']}-{system['VERSION_ID']}")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
