"""Links that real sockets cross: network namespaces, joined by a switch in user space. Needs Linux and root.

Every node is a network namespace with one TUN interface. A single process, the switch, reads what each of them sends,
holds it back as the link between the two nodes would, and writes it to the other's interface. The kernel's own TCP runs
at both ends, with its congestion control, its retransmissions and its buffers. Neither `tc` nor a kernel module beyond
`tun` takes part.
"""
