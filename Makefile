# SPDX-License-Identifier: GPL-2.0-or-later
#
# The front door; the work is done by scripts/. See "make help".

JOBS ?= $(shell nproc)
PYTHON ?= /usr/bin/python3
# What the names of the version's folders end in
SUFFIX = $(shell VERSION='$(VERSION)' QEMU_SRC='$(QEMU_SRC)' \
	scripts/version --suffix)
export VERSION QEMU_SRC CONFIGURE_FLAGS JOBS BUILD PYTHON V WITH TESTS LONG_SECONDS SEED
export PREFIX DESTDIR SOURCES

all:
	@scripts/arguments $@
	@scripts/build

install:
	@scripts/arguments $@
	@scripts/build --install
	@$(PYTHON) scripts/install

uninstall:
	@scripts/arguments $@
	@$(PYTHON) scripts/install --uninstall

# Both set up all that they need
demo:
	@scripts/arguments $@
	@scripts/build --qemu-img demo
	@scripts/demo

check:
	@scripts/arguments $@
	@scripts/build --tests patches
	@scripts/check scripts standalone unit iotests storage

check-standalone:
	@scripts/arguments $@
	@scripts/deps build demo test
	@scripts/check standalone

check-unit:
	@scripts/arguments $@
	@scripts/build --tests
	@scripts/check unit

check-iotests:
	@scripts/arguments $@
	@scripts/build --tests
	@scripts/check iotests

lint:
	@scripts/arguments $@
	@scripts/build --configure lint
	@scripts/check lint

check-fresh:
	@scripts/arguments $@
	@scripts/check-fresh

check-series:
	@scripts/arguments $@
	@scripts/deps build source patches
	@$(PYTHON) scripts/check-series

export:
	@scripts/arguments $@
	@scripts/deps source patches build
	@scripts/export

deb:
	@scripts/arguments $@
	@scripts/deb

check-deb:
	@scripts/arguments $@
	@scripts/check-deb

dist:
	@scripts/arguments $@
	@scripts/deps source patches build
	@scripts/dist

update:
	@scripts/arguments $@
	@scripts/debian-source --update

bench bench-quick:
	@scripts/arguments $@
	@scripts/build demo test bench
	@$(PYTHON) scripts/bench $(if $(findstring quick,$@),--quick) \
		$(patsubst %,'%',$(ROWS))

# The build folders of these are given
check-filtered:
	@scripts/arguments $@
	@BUILD= WITH=test-patches scripts/build demo test upstream
	@scripts/check filtered

check-upstream:
	@scripts/arguments $@
	@scripts/build demo test upstream
	@BUILD= WITH=stock scripts/build
	@BUILD= WITH=test-patches scripts/build
	@scripts/check upstream

# What follows runs in environments of scripts/build and scripts/checks/tests.py
check-long: export WITH = asan
check-long:
	@scripts/arguments $@
	@scripts/build --tests
	@scripts/check random

check-storage: export WITH = storage
check-storage:
	@scripts/arguments $@
	@scripts/deps storage $(if $(STORES),$(filter ceph,$(STORES)),ceph) || \
		echo 'The stores that need them are skipped.'
	@scripts/build demo test
	@$(if $(filter libvirt,$(or $(STORES),libvirt)),WITH= scripts/build)
	@scripts/check storage

check-tsan: export WITH = tsan
check-valgrind: export WITH = valgrind
check-tsan check-valgrind:
	@scripts/arguments $@
	@scripts/build --tests
	@scripts/check unit iotests

coverage: export WITH = gcov
coverage:
	@scripts/arguments $@
	@scripts/build --tests
	@scripts/check unit iotests coverage

check-clang: export WITH = clang
check-clang:
	@scripts/arguments $@
	@scripts/build --tests
	@scripts/checkpatch

clean:
	rm -rf build build-* qemu qemu-[0-9]* qemu-test* export-* dist \
		cache/source* cache/export-* cache/*.tmp-extract.*

distclean: clean
	rm -rf cache

help:
	@echo 'make                   obtain QEMU, apply our patches, build into build/'
	@echo 'make install           build, and install into PREFIX=/usr/local, or below'
	@echo '                       DESTDIR there: programs, links to firmware,'
	@echo '                       keymaps, and where sphinx is, the manual'
	@echo 'make uninstall         remove what was installed, and nothing else'
	@echo 'make demo              build qemu-img, and convert a real image with it,'
	@echo '                       with the cache off and on'
	@echo 'make bench             measure; the results go to $$BUILD/bench/results/.'
	@echo '                       ROWS="filter-4k-disk convert-*" measures only'
	@echo '                       these; "scripts/bench --list" shows all'
	@echo 'make bench-quick       the same with less of everything, in 3 minutes;'
	@echo '                       the results go to $$BUILD/bench/quick-results/'
	@echo 'make check             build, then run all tests; "scripts/check --list"'
	@echo '                       prints which there are. TESTS="seqcache-io ..."'
	@echo '                       runs only these, also with the next three and'
	@echo '                       with check-tsan, check-valgrind and coverage'
	@echo 'make check-standalone  the tests that need glib alone'
	@echo 'make check-unit        the unit tests inside QEMU'
	@echo 'make check-iotests     our iotests and those of qcow2 compression;'
	@echo '                       MODES=none or writeback is their cache mode'
	@echo 'make lint              pylint and mypy over our iotests and scripts'
	@echo 'make check-long        the random tests for long, with AddressSanitizer'
	@echo '                       and UBSan. LONG_SECONDS=N: how long each part'
	@echo '                       goes on (default: 60); PARTS="filter corrupt"'
	@echo '                       runs only these; SEED=N repeats a run'
	@echo 'make check-storage     the same work on each store of scripts/checks/stores.py:'
	@echo '                       file systems, devices and servers, started on'
	@echo '                       loopback. Wants root, and half an hour. Installs'
	@echo '                       these servers, which Debian then starts'
	@echo '                       STORES="iscsi ceph" chooses'
	@echo 'make check-tsan        the unit tests and our iotests with'
	@echo '                       ThreadSanitizer, in build-tsan'
	@echo 'make check-valgrind    the unit tests, and the tools in an iotest, with'
	@echo '                       valgrind, in build-valgrind'
	@echo 'make coverage          a build with --enable-gcov, the unit tests and our'
	@echo '                       iotests in it; prints which of our lines they'
	@echo '                       do not reach; half an hour'
	@echo 'make check-clang       build with clang-19, its thread-safety analysis'
	@echo '                       and -Werror, in build-clang; checkpatch.pl over'
	@echo '                       our files and patches'
	@echo 'make check-filtered    all iotests of QEMU for raw and qcow2, without'
	@echo '                       and with a seqcache node below each image; hours;'
	@echo '                       TESTS="raw:001 qcow2:013 ..." runs only these'
	@echo 'make check-upstream    QEMU'"'"'s own tests, in an unpatched build, in'
	@echo '                       ours, and with the cache forced on: all iotests'
	@echo '                       for raw and qcow2, check-block, check-unit;'
	@echo '                       hours; TESTS="qcow2:013 unit block" runs only'
	@echo '                       these'
	@echo 'make check-fresh       on new Debian systems that debootstrap makes: clone'
	@echo '                       the last commit, make, make demo, make check, as'
	@echo '                       root and as an ordinary user. Wants root, and'
	@echo '                       hours. SUITES="bookworm trixie sid" (default: the'
	@echo '                       first two; sid without check), USERS="root user",'
	@echo '                       PARTS="build demo check" choose'
	@echo 'make check-series      see that each step of the series compiles, and each'
	@echo '                       patch that needs nothing on its own;'
	@echo '                       VERSIONS="10.0" only for these; hours'
	@echo 'make export            write the patches for VERSION as git am and'
	@echo '                       packagers take them, into export-VERSION/'
	@echo 'make deb               packages for Debian 13, from its own source package'
	@echo '                       with our patches, in build-deb/. Wants root.'
	@echo '                       DEB=utils: only qemu-utils and qemu-block-extra;'
	@echo '                       DEB=x86 (default): qemu-system-x86 as well'
	@echo 'make check-deb         in a new Debian 13: install, upgrade, use under'
	@echo '                       libvirt, and downgrade what make deb makes'
	@echo 'make dist              dist/seqcache-VERSION.tar.xz of the last commit, with'
	@echo '                       the export for each version, and SHA256SUMS;'
	@echo '                       SOURCES="PATH ..." like QEMU_SRC, for those that'
	@echo '                       Debian does not have'
	@echo 'make update            take a newer QEMU, if Debian has one'
	@echo 'make clean             remove the prepared tree and all builds'
	@echo 'make distclean         the same, and the downloads'
	@echo
	@echo 'VERSION=N              the version of QEMU, by default the first of'
	@echo '                       these: $(shell scripts/series --versions)'
	@echo 'QEMU_SRC=PATH          a QEMU tree, git checkout, release tarball or'
	@echo '                       .dsc; it is not modified, and remembered until'
	@echo '                       "make clean". Without it: the Debian source'
	@echo '                       package'
	@echo 'JOBS=N                 parallel jobs (default: number of processors)'
	@echo 'BUILD=DIR              build folder (default: build, or build-VERSION for'
	@echo '                       another version than the first); a name that'
	@echo '                       begins with "build-" is ignored by git'
	@echo 'CONFIGURE_FLAGS=...    more flags for QEMU'"'"'s configure'
	@echo 'WITH=asan              build in build-asan, with sanitizers, whose reports'
	@echo '                       are failures of make check; also tsan, valgrind,'
	@echo '                       gcov, clang'
	@echo 'V=1                    show the whole output of each step'

.PHONY: all install uninstall dist check check-standalone check-unit check-iotests check-filtered \
        check-upstream check-long check-storage check-tsan check-valgrind check-clang \
        check-fresh check-deb lint check-series coverage deb export bench \
        bench-quick demo update clean distclean help
