//! Cuts TCP connections in the middle of whatever they carry.

use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy},
    net::{TcpListener, TcpStream},
};

use super::spawn;

/// Forwards to `upstream`. Connection number i is cut after `cuts[i]` bytes of answer; further ones are not.
pub async fn start(upstream: SocketAddr, cuts: Vec<u64>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address");
    spawn(async move {
        let mut cuts = cuts.into_iter();
        while let Ok((caller, _)) = listener.accept().await {
            let limit = cuts.next().unwrap_or(u64::MAX);
            let service = TcpStream::connect(upstream).await.expect("connect");
            spawn(async move {
                let (mut caller_read, mut caller_write) = caller.into_split();
                let (service_read, mut service_write) = service.into_split();
                spawn(async move {
                    let _ = copy(&mut caller_read, &mut service_write).await;
                });
                let mut limited = service_read.take(limit);
                let _ = copy(&mut limited, &mut caller_write).await;
                let _ = caller_write.shutdown().await;
            });
        }
    });
    address
}
