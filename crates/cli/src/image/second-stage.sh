#!/bin/sh
# Runs in the new system, in which the essential packages are unpacked but not known to dpkg. /mnt has the packages.
set -e
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C
export DEBIAN_FRONTEND=noninteractive DEBCONF_NONINTERACTIVE_SEEN=true
cd /mnt

# No service is started here.
printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
chmod 755 /usr/sbin/policy-rc.d
# A small initramfs: what it needs for this disk, since a Realm's first memory is measured page by page.
mkdir -p /etc/initramfs-tools/conf.d /usr/share/initramfs-tools/modules.d
echo MODULES=list >/etc/initramfs-tools/conf.d/realm
echo virtio_blk >/usr/share/initramfs-tools/modules.d/realm
# Disks are synced once, at the end.
options='--force-unsafe-io --force-depends'

echo 'realm-image: configuring the essential packages'
dpkg $options --install debs/base-passwd.deb debs/base-files.deb
dpkg $options --install $(cat essential)
echo 'realm-image: unpacking the other packages'
dpkg $options --unpack $(cat others)
echo 'realm-image: configuring the other packages'
dpkg $options --configure --pending
dpkg --audit

echo 'realm-image: finishing'
cat hostname >/etc/hostname
printf '127.0.0.1 localhost\n127.0.1.1 %s\n::1 localhost ip6-localhost ip6-loopback\n' "$(cat hostname)" >/etc/hosts
echo "UUID=$(blkid -s UUID -o value /dev/vda) / ext4 defaults,errors=remount-ro 0 1" >/etc/fstab
rm -f /etc/apt/sources.list
cat sources >/etc/apt/sources.list.d/debian.sources
if [ -s password ]; then
	echo "root:$(cat password)" | chpasswd
else
	passwd -d root
fi
if [ -s key ]; then
	mkdir -p -m 700 /root/.ssh
	cat key >/root/.ssh/authorized_keys
	chmod 600 /root/.ssh/authorized_keys
	# Each machine makes its own keys as well.
	rm -f /etc/ssh/ssh_host_*
	mkdir -p /etc/systemd/system/ssh.service.d
	printf '[Service]\nExecStartPre=\nExecStartPre=/usr/bin/ssh-keygen -A\nExecStartPre=/usr/sbin/sshd -t\n' \
		>/etc/systemd/system/ssh.service.d/keys.conf
fi
# The host's `realm exec`, `cp` and `stop` talk to this.
if [ -s realm-agent ]; then
	install -D -m 755 realm-agent /usr/sbin/realm-agent
	install -D -m 644 realm-agent.service /etc/systemd/system/realm-agent.service
	mkdir -p /etc/systemd/system/multi-user.target.wants
	ln -sf ../realm-agent.service /etc/systemd/system/multi-user.target.wants/realm-agent.service
fi
# The network's service has to find it there.
: >/etc/resolv.conf
# There are no virtual terminals.
ln -sf /dev/null /etc/systemd/system/getty-static.service
rm -f /etc/systemd/system/getty.target.wants/getty@tty1.service
# Each machine finds its own number when it starts first.
: >/etc/machine-id
ls /boot/vmlinuz-* /boot/initrd.img-*
rm -f /usr/sbin/policy-rc.d
apt-get clean
rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log /var/log/bootstrap.log /var/cache/debconf/*-old
