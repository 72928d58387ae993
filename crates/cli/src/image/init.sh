#!/bin/busybox sh
# The first program of the machine that installs packages: /dev/vda is the new file system, /dev/vdb has the packages.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs dev /dev 2>/dev/null
mount -t proc proc /proc
mount -t sysfs sys /sys

end() {
	sync
	poweroff -f
	while :; do sleep 60; done
}
fail() {
	echo "installer: $*"
	end
}

load-module virtio_blk || fail 'no driver for disks'
mkdir -p /new /packages
for disk in vda vdb; do
	tries=0
	while ! [ -b /dev/$disk ] && [ $tries -lt 50 ]; do sleep 0.1; tries=$((tries + 1)); done
done
mount -t ext4 /dev/vda /new || fail 'cannot mount the new file system'
mount -t ext4 -o ro /dev/vdb /packages || fail 'cannot mount the packages'

# dpkg itself, and what it needs to run, cannot be installed by dpkg.
echo 'realm-image: the essential packages'
for package in $(cat /packages/essential); do
	ar p "/packages/$package" data.tar | tar -x -f - -C /new || fail "cannot unpack $package"
done

for directory in dev proc sys run tmp mnt; do mkdir -p "/new/$directory"; done
mount -t devtmpfs dev /new/dev
mkdir -p /new/dev/pts /new/dev/shm
mount -t proc proc /new/proc
mount -t sysfs sys /new/sys
mount -t tmpfs run /new/run
mount --bind /packages /new/mnt
chroot /new /bin/sh /mnt/second-stage </dev/null || fail 'the second stage failed'
for place in mnt run sys proc dev; do umount "/new/$place"; done
fstrim /new
umount /new || mount -o remount,ro /new || fail 'the new file system is still in use'
echo 'realm-image: done'
end
