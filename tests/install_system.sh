#!/usr/bin/env bash
# The Debian packages that some tests need: Slurm for tests/slurm, Chromium to look at the report,
# g++ for torch.compile and the sampler's kernel.
# Where they can't be installed (no root, another system) those tests skip, and say so.
set -uo pipefail
packages=(
    munge slurmctld slurmd slurmdbd slurm-client mariadb-server-core mariadb-client-core
    chromium g++
)
dpkg -s "${packages[@]}" >/dev/null 2>&1 && exit
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq && apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null ||
    echo "no system packages here: the tests of Slurm and of the report's looks will skip" >&2
exit 0
