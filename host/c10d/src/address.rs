//! Which of this machine's addresses the other ranks can reach.

use std::env;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, ToSocketAddrs, UdpSocket};

use crate::Error;

/// The interfaces that the user names for Gloo, as `torch.distributed` reads them.
pub(crate) fn chosen_interfaces() -> Vec<String> {
    let names = env::var("GLOO_SOCKET_IFNAME").unwrap_or_default();
    names
        .split(',')
        .map(str::trim)
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

/// The own address of the interface through which `host` is reached. No packet is sent: connecting a datagram socket
/// asks the routing table alone.
pub(crate) fn route_to(host: &str) -> Option<IpAddr> {
    // Any port but 0 would do.
    let mut targets = (host, 9).to_socket_addrs().ok()?;
    targets.find_map(|target| {
        let any: IpAddr = if target.is_ipv4() {
            Ipv4Addr::UNSPECIFIED.into()
        } else {
            Ipv6Addr::UNSPECIFIED.into()
        };
        let socket = UdpSocket::bind((any, 0)).ok()?;
        socket.connect(target).ok()?;
        Some(socket.local_addr().ok()?.ip())
    })
}

/// The own address to use, when `own` is the way to the master and `others` tells the ways of all ranks.
///
/// On the master's machine its name may stand for loopback (Debian's `/etc/hosts` has it so), where nobody else finds
/// it. The way to a rank on another machine then tells the address that the outside sees.
pub(crate) fn visible(
    own: IpAddr,
    others: impl FnOnce() -> Result<Vec<IpAddr>, Error>,
) -> Result<IpAddr, Error> {
    if !own.is_loopback() {
        return Ok(own);
    }
    Ok(others()?
        .iter()
        .find(|other| !other.is_loopback())
        .and_then(|other| route_to(&other.to_string()))
        .unwrap_or(own))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    #[test]
    fn the_way_to_this_machine_is_loopback() {
        assert_eq!(route_to("127.0.0.1"), Some(LOOPBACK));
        assert_eq!(route_to("no such host"), None);
    }

    #[test]
    fn loopback_stays_where_all_ranks_share_a_machine() {
        let all = || Ok(vec![LOOPBACK, LOOPBACK]);
        assert_eq!(visible(LOOPBACK, all), Ok(LOOPBACK));
    }

    #[test]
    fn an_address_that_others_see_is_kept() {
        let own = IpAddr::from([10, 0, 0, 2]);
        let unasked = || Err(Error::new("nobody has to be asked"));
        assert_eq!(visible(own, unasked), Ok(own));
    }

    /// From a machine to its own address the way is that address.
    #[test]
    fn loopback_gives_way_to_the_address_on_the_way_to_another_machine() {
        let Some(outside) = route_to("192.0.2.1").filter(|own| !own.is_loopback()) else {
            return; // no network at all: nothing to tell apart
        };
        let all = || Ok(vec![LOOPBACK, outside]);
        assert_eq!(visible(LOOPBACK, all), Ok(outside));
    }
}
