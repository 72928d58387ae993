#!/bin/busybox sh
# The first program on the emulated host: a bare minimum of a system, then the agent.
/bin/busybox --install -s /bin
export PATH=/bin:/ HOME=/root TERM=linux PS1='host:\w\$ '
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev 2>/dev/null
mkdir -p /dev/pts /dev/shm /tmp /run /root /dev/virtio-ports
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /tmp
mount -t debugfs debugfs /sys/kernel/debug
# A VMM that was killed leaves what the parent must reap; addresses in the log help more than they hurt here.
echo 0 >/proc/sys/kernel/kptr_restrict
ip link set lo up 2>/dev/null
hostname host
# Drivers for the devices that are there.
for modalias in /sys/bus/virtio/devices/*/modalias; do
    case $(cat "$modalias" 2>/dev/null) in
    virtio:d00000001*) load-module virtio_net ;;
    virtio:d00000002*) load-module virtio_blk ;;
    esac
done
[ -e /guest/kernel ] || mkdir -p /guest
# Ports are found by name, as udev would make them.
for name in /sys/class/virtio-ports/*/name; do
    [ -e "$name" ] || continue
    directory=${name%/name}
    ln -sf "/dev/${directory##*/}" "/dev/virtio-ports/$(cat "$name")"
done
/realm lab-agent
status=$?
echo "kvm-realm: the lab's agent ended with status $status" >/dev/console
poweroff -f
