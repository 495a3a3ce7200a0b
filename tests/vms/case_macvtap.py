"""The problem that vlanswitchd was written for: it is still there, and still solved."""

import unittest

import side_by_side
from lab import shared


class MacvtapAgainstVlanswitchd(unittest.TestCase):
    def test_an_e1000_guest_is_found_by_ipv6(self):
        rows = side_by_side.compare(shared())
        print(side_by_side.text(shared(), rows), end="")
        for what, (on_macvtap, _, on_vlanswitchd) in rows:
            with self.subTest(what):
                self.assertEqual(*on_vlanswitchd)
                # A hash of 8 bits may let a group through by accident, not half of them.
                if "ARP" not in what:
                    self.assertLess(on_macvtap[0], on_macvtap[1] / 2)
