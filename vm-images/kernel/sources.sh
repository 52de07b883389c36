#!/bin/sh
# The Debian sources that this machine's apt uses, as mmdebstrap reads them.
set -eu
apt-get indextargets --format '$(ORIGIN)|deb $(REPO_URI) $(RELEASE) $(COMPONENT)' \
    'Created-By: Packages' 'Architecture: amd64' |
    sed -n 's/^Debian|//p' | grep -E ' bookworm(-updates|-security)? ' | sort -u
