//! What kubelet probes: an HTTP, a TCP and a gRPC server in one process.
//!
//! `serve HTTP TCP GRPC` listens on the three ports. HTTP answers every path with 200; TCP
//! accepts and closes; gRPC serves `grpc.health.v1.Health`, which says SERVING for the
//! whole server.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};

use tokio::runtime::Builder;

use super::serve;

/// Serves until told to end.
pub(crate) fn run(args: &[String]) -> io::Result<()> {
    let ports: Vec<u16> = args.iter().filter_map(|arg| arg.parse().ok()).collect();
    let [http, tcp, grpc] = ports[..] else {
        return Err(io::Error::other("serve HTTP-PORT TCP-PORT GRPC-PORT"));
    };
    let plain = TcpListener::bind((Ipv4Addr::UNSPECIFIED, tcp))?;
    // threads inherit the blocked signals that `serve` waits for
    super::end_signals().thread_block()?;
    std::thread::spawn(move || plain.incoming().for_each(drop));
    let address = SocketAddr::from((Ipv4Addr::UNSPECIFIED, grpc));
    std::thread::spawn(move || {
        if let Err(error) = health(address) {
            eprintln!("gRPC on {address}: {error}");
        }
    });
    serve(http, "ok\n")
}

fn health(address: SocketAddr) -> io::Result<()> {
    let executor = Builder::new_current_thread().enable_all().build()?;
    executor.block_on(async {
        // a fresh reporter says that the server as a whole is serving
        let (_reporter, service) = tonic_health::server::health_reporter();
        let server = tonic::transport::Server::builder().add_service(service).serve(address);
        server.await.map_err(io::Error::other)
    })
}
