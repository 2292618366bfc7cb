#!/bin/sh -e
# For `tcpmig migrate --takeover-hook`: a secondary private IPv4 address of AWS EC2 goes to the network interface of
# another instance.  Called on the source, with the point in TCPMIG_HOOK and the addresses in TCPMIG_ADDRESSES.
#
#     tcpmig migrate PID HOST --takeover-hook '/etc/tcpmig/takeover_aws.sh eni-of-HOST eni-of-this-host'
#
# Interfaces are arguments: what maps HOST to an interface (tags, a file) is the site's own.

there=$1 here=$2

assign() {
    aws ec2 assign-private-ip-addresses --allow-reassignment --network-interface-id "$1" \
        --private-ip-addresses $TCPMIG_ADDRESSES $2
}

case $TCPMIG_HOOK in
check)
    # nothing is changed yet: is it ours, and may we?  (--dry-run ends with an error in any case; its text tells)
    for address in $TCPMIG_ADDRESSES; do
        aws ec2 describe-network-interfaces --network-interface-ids "$here" --output text \
            --query 'NetworkInterfaces[].PrivateIpAddresses[?!Primary].PrivateIpAddress' | grep -qwF "$address"
    done
    assign "$there" --dry-run 2>&1 | grep -q DryRunOperation
    ;;
take)
    # may be called again by `tcpmig recover`: it is no error that it is there already
    assign "$there"
    ;;
undo) ;; # nothing was changed
esac
