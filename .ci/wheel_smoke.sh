#!/usr/bin/env bash
# Builds sdist and wheel, installs the wheel away from the checkout, and runs the program in an empty folder without HOME.
# Usage: .ci/wheel_smoke.sh [PYTHON]     PYTHON: of an environment that has the dependencies; default: python
set -euo pipefail
cd "$(dirname "$0")/.."
python="$(command -v "${1:-python}")"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
packages=(configs latent_control learners pipeline rollout_workers)

"$python" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check build
mkdir "$work/src" "$work/empty"
cp -r pyproject.toml README.md LICENSE "${packages[@]}" "$work/src"
"$work/venv/bin/python" -m build --outdir "$work/dist" "$work/src" > "$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }

# Whatever lies in the packages is in the wheel: pages' assets, configs, the embedded base LM.
wheel=("$work"/dist/*.whl)
"$python" -m zipfile -l "${wheel[0]}" | awk '{ print $1 }' | sort > "$work/packed"
missing="$(find "${packages[@]}" -type f ! -name '*.py[co]' | sort | comm -23 - "$work/packed")"
[ -z "$missing" ] || { printf 'not in the wheel, add to package-data in pyproject.toml:\n%s\n' "$missing" >&2; exit 1; }

# The dependencies by path alone: the environment's own .pth files, an editable install's among them, are not read.
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps "${wheel[0]}"
site="$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$site/dependencies.pth"

cd "$work/empty"
alone=(env -i "PATH=$work/venv/bin:$PATH")
"${alone[@]}" python -c "import pipeline; assert pipeline.__file__.startswith('$site'), pipeline.__file__"
"${alone[@]}" latent-control --help > /dev/null
"${alone[@]}" latent-control --version
"${alone[@]}" latent-control config check quickstart
[ -z "$(ls -A)" ] || { echo "config check left something: $(ls -A)" >&2; exit 1; }
