"""A small privileged service through which an unprivileged process moves its *own* connections (paper, 5.6).

::

    client                                          chaperone (CAP_NET_ADMIN and little else)
    hello                                     ->    who is it? SO_PEERCRED
                                              <-    welcome: the limits
    freeze, export  conn-ID or its own socket ->    the socket's owner is the same user?
                                              <-    the record
    rebuild         record                    ->    address, port and options are the caller's to use?
    release                                   ->    the address is here
                                              <-    the socket, by SCM_RIGHTS
    (the client vanishes)                           what it had frozen flows again

messages    what is said                protocol    framing and both sides' rules, sans-IO
policy      limits, what may be built   identity    whose socket it is
holding     frozen and rebuilt ones     journal     what outlives the chaperone
operations  the requests                server, client
privilege   everything else is dropped     seal       signed records

The client never has a socket in repair mode whose connection it may choose: whoever holds one can give it any ends and
numbers without a capability (net/ipv4/tcp.c, TCP_QUEUE_SEQ), and only leaving repair mode takes one.  So a rebuilt
socket is handed out when it has left repair mode, and one that was exported is looked at again, still silenced, after
it has left repair mode and before it may send.
"""
