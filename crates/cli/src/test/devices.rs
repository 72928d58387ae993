//! The devices of a Realm, all in one guest.

use std::path::PathBuf;

use anyhow::{Result, ensure};

use super::on_machine;
use crate::args::MachineArgs;
use crate::setup::Environment;

/// One guest with two disks, a network, entropy and all streams of a command, all of which interrupt by messages; its
/// clock agrees with the host's, and its token's measurement is the one that its launch manifest predicts. The raw disk is
/// checked from outside; so is the VMM, whose threads are confined, and which takes less than 8 MiB beside one mapping of
/// the guest's memory. An ordinary VM shares the folder as well, and has the same clock.
pub(super) fn devices(environment: &Environment) -> Result<()> {
    let directory = std::env::temp_dir().join(format!("realm-devices-{}", std::process::id()));
    std::fs::create_dir_all(&directory)?;
    let image = directory.join("test.qcow2");
    vmm::disk::create_qcow2(&image, 16 << 20)?;
    let result = run_devices(environment, image);
    let _ = std::fs::remove_dir_all(&directory);
    result
}

fn run_devices(environment: &Environment, image: PathBuf) -> Result<()> {
    let guest = "set -e\n\
         echo \"input: $(cat)\"\n\
         echo errors >&2\n\
         cat /mnt/folder/file; echo hello >/mnt/folder/hello; ls /mnt/folder\n\
         date +%s >/mnt/folder/now\n\
         dd if=/dev/vda bs=4k 2>/dev/null | md5sum\n\
         dd if=/dev/vda of=/dev/vda bs=64k count=4 seek=4 2>/dev/null\n\
         sync\n\
         mke2fs -F /dev/vdb >/dev/null 2>&1; mkdir -p /mnt; mount -t ext4 /dev/vdb /mnt\n\
         dd if=/dev/urandom of=/mnt/f bs=64k count=20 2>/dev/null; before=$(md5sum </mnt/f)\n\
         umount /mnt; mount -t ext4 -o ro /dev/vdb /mnt\n\
         [ \"$before\" = \"$(md5sum </mnt/f)\" ] && echo same file\n\
         dd if=/dev/vdc of=/dev/null bs=512 count=1 2>/dev/null\n\
         if dd if=/dev/zero of=/dev/vdc bs=512 count=1 2>/dev/null; then echo written; fi\n\
         ip addr add 10.9.0.2/24 dev eth0; ip link set eth0 up\n\
         ping -c 2 -s 1000 10.9.0.1 >/dev/null && echo pong\n\
         grep -q 'ITS.*virtio2-req' /proc/interrupts && ! grep 'GICv3.*virtio' /proc/interrupts && echo messages\n\
         echo vectors of $(cat /proc/sys/abi/sve_default_vector_length)\n\
         dmesg | grep -q 'armv8_pmuv3 PMU driver, 5 ' && echo counters\n\
         dmesg | grep -o 'found 2 breakpoint and 2 watchpoint'\n\
         cat /dev/vdc >/tmp/realm; chmod +x /tmp/realm; /tmp/realm count-overflows 20\n\
         [ $(awk '/pmu/ {print $2}' /proc/interrupts) -ge 20 ] && echo that many interrupts\n\
         load-module virtio-rng; echo $(dd if=/dev/hwrng bs=32 count=1 2>/dev/null | wc -c) random bytes\n\
         realm report --nonce text:nonce --out /tmp/token; echo token $(base64 </tmp/token | tr -d '\\n')\n\
         exit 9";
    let script = format!(
        "load-module tun || exit 1\n\
         realm capabilities | grep -q 'ITS.*yes' || {{ realm capabilities; exit 1; }}\n\
         dd if=/dev/urandom of=/tmp/raw.img bs=64k count=8 2>/dev/null\n\
         dd if=/realm of=/tmp/ro.img bs=64k conv=sync 2>/dev/null\n\
         before=$(md5sum </tmp/raw.img)\n\
         mkdir /tmp/folder; echo shared file >/tmp/folder/file\n\
         (until ip link set tap0 up 2>/dev/null; do sleep 0.3; done; ip addr add 10.9.0.1/24 dev tap0) &\n\
         (until [ $(grep -l 'Seccomp:.*2' /proc/[0-9]*/task/*/status 2>/dev/null | wc -l) -ge 10 ]; do sleep 1; done; touch /tmp/confined) &\n\
         echo typed | realm run --events-fd 3 --disk /tmp/raw.img --disk /test.qcow2 --disk /tmp/ro.img,ro --net tap=tap0 --share /tmp/folder \\\n\
         \t--hash sha512 --personalization text:devices --sve 256 --pmu 4 --breakpoints 2 --watchpoints 2 --manifest /tmp/manifest.json \\\n\
         \t--exec '{}' >/tmp/out 2>/tmp/errors 3>/tmp/events\n\
         echo status $?\n\
         grep -v ^token /tmp/out | sed \"s/$before/same disk/\"\n\
         measured='^realm: the Realm measures [0-9a-f]*, as predicted$'\n\
         grep -v \"$measured\" /tmp/errors; grep -c \"$measured\" /tmp/errors\n\
         half='bs=64k count=4'\n\
         [ \"$(dd if=/tmp/raw.img $half 2>/dev/null | md5sum)\" = \\\n\
         \t\"$(dd if=/tmp/raw.img $half skip=4 2>/dev/null | md5sum)\" ] && echo written from inside\n\
         cat /tmp/folder/hello\n\
         now=$(cat /tmp/folder/now); apart=$((now - $(stat -c %Y /tmp/folder/now)))\n\
         [ $now -gt 1760000000 ] && [ ${{apart#-}} -le 3 ] && echo on time || echo \"the guest says $now, $apart s from here\"\n\
         realm run --plain --share /tmp/folder --exec 'cat /mnt/folder/file; [ $(date +%s) -ge '$now' ] && echo plain'\n\
         [ -e /tmp/confined ] && echo confined\n\
         number() {{ sed -n 's/.*\"'$1'\":\\([0-9]*\\).*/\\1/p' /tmp/events; }}\n\
         [ $(number guest_mappings) = 1 ] && [ $(number guest_mapped_bytes) = $((512 << 20)) ] && echo mapped once\n\
         [ $(number vmm_bytes) -lt $((8 << 20)) ] && echo small || number vmm_bytes\n\
         rim=$(realm measure /tmp/manifest.json)\n\
         sed -n 's/^token //p' /tmp/out | base64 -d | hexdump -ve '1/1 \"%02x\"' >/tmp/token\n\
         grep -q \"$rim\" /tmp/token && echo predicted ${{#rim}} digits\n",
        guest.replace('\'', "'\\''")
    );
    let machine = MachineArgs { host_cpus: Some(1), ..MachineArgs::default() };
    let (outcome, text) = on_machine(environment, &machine, &[image], true, &script, 300)?;
    let expected = "status 9\ninput: typed\nshared file\nfile\nhello\nsame disk\nsame file\npong\nmessages\nvectors of 32\n\
                    counters\nfound 2 breakpoint and 2 watchpoint\n20 overflows\nthat many interrupts\n\
                    32 random bytes\nerrors\n1\n\
                    written from inside\nhello\non time\nshared file\nplain\nconfined\nmapped once\nsmall\npredicted 128 digits\n";
    let text = text.replace("same disk  -", "same disk");
    ensure!(outcome.status == 0 && text == expected, "status {}, the host printed:\n{text}", outcome.status);
    Ok(())
}
