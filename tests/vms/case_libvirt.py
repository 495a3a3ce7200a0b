"""VMs of libvirt's, with the very XML of docs/libvirt.md."""

import documents
from checks import Checks, datagram_to_host, heard, listening_host
from lab import eventually, far_address, guest_address, run, shared
from libvirt import TAP, Domain, Libvirt

OURS, THEIRS = "libvirt, tap made by vlanswitchd", "libvirt, tap made by libvirt"
STARTS = 5
# In kilobytes a second. Toward the guest libvirt makes it a queue, so high here that it
# limits nothing; from the guest it makes it policing at the tap's ingress, behind the
# seal, where it meets no frame however low it is.
INBOUND = "<inbound average='1000000' peak='2000000' burst='10240'/>"
OUTBOUND = "<outbound average='8' peak='8' burst='8'/>"
# So many seals need seconds to be moved to where they stay.
CROWD = 60


class LibvirtCase(Checks):
    @classmethod
    def setUpClass(cls):
        cls.libvirt = Libvirt(shared())
        cls.addClassCleanup(cls.libvirt.close)

    def switch(self, title, *options, block=0):
        """Starts vlanswitchd as a section of the document says."""
        mapping = documents.maps(title)[block]
        return self.serve("--map", mapping, *options, taps=[TAP])

    def domain(self, interface, processors=1):
        domain = Domain(self.libvirt, interface, processors)
        # First of all, so that the tap is free when the daemon ends.
        self.addCleanup(lambda: run(*self.libvirt.virsh_words("destroy", domain.name), check=False))
        return domain

    def boot(self, domain):
        domain.start()
        self.agent = domain.ready()
        self.configure()

    def kill_under_traffic(self, domain):
        """SIGKILL to QEMU while it sends and is sent to."""
        self.agent.start("flood", address=far_address(4, "101"), port=9, size=1400, seconds=30)
        flood = self.lab.far.start("flood", address=guest_address(4, "101"), port=9, size=1400, seconds=3)
        before = self.daemon.port(TAP)
        eventually("traffic flows both ways", lambda: all(
            self.daemon.port(TAP)[way]["out_frames"] > before[way]["out_frames"] + 500
            for way in ("from_guest", "to_guest")
        ))
        domain.kill()
        domain.gone()
        self.lab.far.result(flood)

    def test_a_tap_of_vlanswitchds(self):
        self.daemon = self.switch(OURS)
        domain = self.domain(documents.xml(OURS)[0])
        self.boot(domain)
        self.daemon.attached(TAP)
        self.both_ways()
        self.tcp()
        with self.subTest("reboot"):
            domain.reboot()
            self.configure()
            self.both_ways()
        with self.subTest("killed and started again"):
            self.kill_under_traffic(domain)
            self.assertEqual(self.daemon.port(TAP)["state"], "no_carrier")
            # What was sent to the tap without a guest was counted, not lost.
            self.assertGreater(self.daemon.port(TAP)["to_guest"]["drops"]["guest_absent"], 0)
            self.boot(domain)
            self.daemon.attached(TAP)
            self.both_ways()
        with self.subTest("vlanswitchd is restarted under it"):
            self.daemon.stop()
            self.daemon = self.switch(OURS)
            self.daemon.attached(TAP)
            self.both_ways()

    def test_a_tap_of_libvirts(self):
        self.daemon = self.switch(THEIRS)
        domain = self.domain(documents.xml(THEIRS)[0])
        self.assertEqual(self.daemon.port(TAP)["state"], "absent")
        for number in range(STARTS):
            with self.subTest("started and stopped", number=number):
                domain.start()
                self.daemon.attached(TAP)
                domain.destroy()
                eventually("the tap goes with its VM", lambda: self.daemon.port(TAP)["state"] == "absent")
        self.boot(domain)
        self.daemon.attached(TAP)
        self.both_ways()
        self.tcp()
        with self.subTest("reboot"):
            domain.reboot()
            self.configure()
            self.both_ways()
        with self.subTest("killed and started again"):
            self.kill_under_traffic(domain)
            eventually("the tap is gone", lambda: self.daemon.port(TAP)["state"] == "absent")
            self.boot(domain)
            self.daemon.attached(TAP)
            self.both_ways()

    def test_several_queues(self):
        self.daemon = self.switch(OURS, block=1)
        interface = with_queues(documents.xml(OURS))
        domain = self.domain(interface, processors=2)
        self.boot(domain)
        self.daemon.attached(TAP)
        self.agent.run("ethtool -L eth0 combined 2")
        tap = self.lab.host.link(TAP)["linkinfo"]["info_data"]
        # The guest's two processors use two of the four.
        self.assertEqual((tap["numqueues"], tap["numdisabled"]), (2, 2))
        self.both_ways()
        self.tcp()

    def test_the_queues_disagree(self):
        """It says no more than the document says it says."""
        said = "Unable to create tap device tap-web1: Invalid argument"
        self.assertIn(said, documents.section(OURS))
        for block, interface in ((0, with_queues(documents.xml(OURS))), (1, documents.xml(OURS)[0])):
            with self.subTest(block=block):
                self.daemon = self.switch(OURS, block=block)
                with self.assertRaisesRegex(Exception, said):
                    self.domain(interface).start()
                self.doCleanups()

    def test_another_libvirtd_is_not_disturbed(self):
        other = Libvirt(self.lab, "other-libvirt")
        self.addCleanup(other.close)
        self.daemon = self.switch(OURS)
        mine = self.domain(documents.xml(OURS)[0])
        mine.start()
        self.assertIn(mine.name, self.libvirt.virsh("list", "--name"))
        self.assertEqual(other.virsh("list", "--name").strip(), "")
        self.assertTrue(self.libvirt.answers() and other.answers())

    def test_a_tap_that_exists_without_managed_no(self):
        said = "The tap-web1 interface already exists"
        self.assertIn(said, documents.section(OURS))
        self.daemon = self.switch(OURS)
        with self.assertRaisesRegex(Exception, said):
            self.domain(documents.xml(THEIRS)[0]).start()

    def test_a_bandwidth_limit_on_a_tap_of_vlanswitchds(self):
        """Even where the VM starts while the seal is still where libvirt wants to be."""
        crowd = [f"tap-{number}" for number in range(CROWD)]
        maps = [word for vid, tap in enumerate(crowd, 1000) for word in ("--map", f"{vid}={tap}")]
        # The last one mapped is moved first.
        self.daemon = self.switch(OURS, *maps)
        self.addCleanup(self.remove, crowd)
        domain = self.domain(limited(documents.xml(OURS)[0]))
        self.assertIn("vlansw_seal", self.tc("filter", "show", "dev", TAP, "ingress"))
        self.boot(domain)
        self.withstands(domain)
        # 1 MiB at 8 kB/s would take two minutes.
        self.tcp()

    def test_a_bandwidth_limit_on_a_tap_of_libvirts(self):
        self.daemon = self.switch(THEIRS)
        domain = self.domain(limited(documents.xml(THEIRS)[0]))
        for number in range(STARTS):
            with self.subTest("started and stopped", number=number):
                domain.start()
                self.daemon.attached(TAP)
                domain.destroy()
                eventually("the tap goes with its VM", lambda: self.daemon.port(TAP)["state"] == "absent")
        self.boot(domain)
        self.withstands(domain)

    def test_a_bandwidth_limit_on_a_tap_found_at_start(self):
        domain = self.domain(documents.xml(THEIRS)[0])
        self.lab.host.ip("link", "del", TAP, check=False)
        domain.start()
        self.daemon = self.switch(THEIRS)
        self.assertIn("vlansw_seal", self.tc("filter", "show", "dev", TAP, "ingress"))
        self.agent = domain.ready()
        self.configure()
        self.withstands(domain)

    def tc(self, *words):
        return run("tc", "-netns", self.lab.host.name, *words)

    def withstands(self, domain):
        """`<bandwidth>` changes how the tap queues, and neither seal nor connection."""
        self.daemon.attached(TAP)
        frame = datagram_to_host(b"from the guest")
        with listening_host(self.lab) as ear:
            sending = self.agent.start("send_frame", device="eth0", frame=frame, seconds=120)
            before = self.daemon.port(TAP)["from_guest"]["out_frames"]
            for _ in range(2):
                domain.tune("--inbound", "0", "--outbound", "0")
                self.assertNotIn("htb", self.tc("qdisc", "show", "dev", TAP))
                domain.tune("--inbound", "1000000,2000000,10240", "--outbound", "8,8,8")
                qdiscs = self.tc("qdisc", "show", "dev", TAP)
                self.assertIn("qdisc htb", qdiscs)
                self.assertIn("qdisc ingress", qdiscs)
            self.assertFalse(sending.done(), "the guest has sent all the time")
            self.agent.call("enough")
            self.assertGreater(self.agent.result(sending), 100)
            self.assertGreater(self.daemon.port(TAP)["from_guest"]["out_frames"], before + 100)
            self.assertEqual(heard(ear), [])
        self.assertEqual([message for message in self.daemon.messages() if "seal" in message], [])
        self.both_ways()


def limited(interface):
    """The interface with a limit for each direction."""
    return interface.replace("</interface>", f"<bandwidth>{INBOUND}{OUTBOUND}</bandwidth></interface>")


def with_queues(blocks):
    """The interface of the first block with the elements of the second."""
    interface, elements = blocks
    return interface.replace("  <model type='e1000'/>\n", elements)
