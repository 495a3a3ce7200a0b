//! Bulk TCP between the guest's stack and the far end's.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::scene::{FAR_IP, Scene};
use super::traffic::Worker;
use super::workload::{Bench, Direction, Outcome, window};

/// Bulk data over real TCP; counts what applications receive.
pub fn tcp(scene: &Scene, direction: Direction, streams: usize, bench: &Bench) -> Result<Outcome> {
    const PORT: u16 = 5201;
    let guest = scene.guest.as_ref().context("this scene has no guest stack")?;
    let listener =
        scene.far.run(|| TcpListener::bind(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, PORT)))??;
    let mut workers = Vec::new();
    let mut receivers = Vec::new();
    for _ in 0..streams {
        let near = guest.run(|| TcpStream::connect((FAR_IP, PORT)))??;
        let (far, _) = listener.accept()?;
        let (sender, receiver) = match direction {
            Direction::ToWire => (near, far),
            Direction::ToGuest | Direction::FromNic => (far, near),
        };
        workers.push(stream_sender(sender)?);
        receivers.push(stream_receiver(receiver)?);
    }
    let ([rate], usage) = window(bench, || Ok([receivers.iter().map(Worker::count).sum()]))?;
    for worker in workers.into_iter().chain(receivers) {
        worker.stop()?;
    }
    if rate == 0.0 {
        bail!("no data arrived");
    }
    Ok(Outcome::new(
        [
            ("gbit_per_s", rate * 8.0 / 1e9),
            ("busy_ns_per_kibibyte", usage.busy / usage.seconds / rate * 1024.0 * 1e9),
        ],
        &usage,
    ))
}

/// Times a socket waits, so that threads look at their stop flag.
const PATIENCE: Duration = Duration::from_millis(50);
const CHUNK: usize = 256 << 10;

fn stream_sender(mut stream: TcpStream) -> Result<Worker> {
    stream.set_write_timeout(Some(PATIENCE))?;
    Worker::start("tcp-sender", move |stop, count| {
        let data = vec![0x5a; CHUNK];
        while !stop.load(Ordering::Relaxed) {
            match stream.write(&data) {
                Ok(sent) => _ = count.fetch_add(sent as u64, Ordering::Relaxed),
                // The receiver may be stopped first.
                Err(error) if stop.load(Ordering::Relaxed) || is_timeout(&error) => {}
                Err(error) => return Err(error).context("TCP sender"),
            }
        }
        Ok(())
    })
}

fn stream_receiver(mut stream: TcpStream) -> Result<Worker> {
    stream.set_read_timeout(Some(PATIENCE))?;
    Worker::start("tcp-receiver", move |stop, count| {
        let mut data = vec![0; CHUNK];
        while !stop.load(Ordering::Relaxed) {
            match stream.read(&mut data) {
                Ok(0) => break,
                Ok(taken) => _ = count.fetch_add(taken as u64, Ordering::Relaxed),
                Err(error) if stop.load(Ordering::Relaxed) || is_timeout(&error) => {}
                Err(error) => return Err(error).context("TCP receiver"),
            }
        }
        Ok(())
    })
}

fn is_timeout(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}
