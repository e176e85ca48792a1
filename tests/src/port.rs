//! Ports for what tests start.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};

use runner_core::clock::{IdGen as _, SystemIds};

/// Below the ports that the kernel gives to outgoing connections (32768 and up) and Kubernetes to its Services (30000 and up): so
/// that nobody takes by chance the port of a server that was killed and is about to come back.
const PORTS: std::ops::Range<u16> = 20_000..30_000;

/// An address of the loopback whose port nobody listens on now, on any address.
///
/// # Panics
/// Where there is none.
pub fn free_address() -> SocketAddr {
    for _ in 0..1_000 {
        let span = u64::from(PORTS.end - PORTS.start);
        let port = PORTS.start + u16::try_from(SystemIds.random() % span).expect("within the span");
        if TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok() {
            return (Ipv4Addr::LOCALHOST, port).into();
        }
    }
    panic!("no port is free")
}
