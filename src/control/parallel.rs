//! Waiting for the kernel many times at once.

use std::sync::Mutex;
use std::thread::{Builder, Scope, ScopedJoinHandle};

/// Does something with all items at once. Opening and closing packet sockets is
/// waiting for the kernel's RCU grace periods (`synchronize_net` in
/// `net/packet/af_packet.c`, 10-20 ms each), which all who wait together share. Where
/// no thread is to be had the calling one does the work.
pub fn in_parallel<T: Send, R: Send>(items: Vec<T>, f: impl Fn(T) -> R + Sync) -> Vec<R> {
    const THREADS_MAX: usize = 256;
    if items.len() < 2 {
        return items.into_iter().map(f).collect();
    }
    let per_thread = items.len().div_ceil(THREADS_MAX);
    let mut items = items.into_iter();
    let chunks = std::iter::from_fn(|| {
        let chunk: Vec<T> = items.by_ref().take(per_thread).collect();
        (!chunk.is_empty()).then_some(Mutex::new(chunk))
    });
    // Each chunk stays here, so that it is not lost with a thread that cannot start.
    let chunks: Vec<_> = chunks.collect();
    std::thread::scope(|scope| {
        let f = &f;
        let take = |chunk: &Mutex<Vec<T>>| std::mem::take(&mut *lock(chunk));
        let threads: Vec<_> = chunks
            .iter()
            .map(|chunk| {
                let work = move || take(chunk).into_iter().map(f).collect::<Vec<R>>();
                (chunk, start(scope, work))
            })
            .collect();
        let results = threads.into_iter().map(|(chunk, thread)| match thread {
            Some(thread) => join(thread),
            None => take(chunk).into_iter().map(f).collect(),
        });
        results.flatten().collect()
    })
}

/// Does two things at once, the first of them on this thread.
pub fn beside<A, B: Send>(here: impl FnOnce() -> A, there: impl Fn() -> B + Sync) -> (A, B) {
    std::thread::scope(|scope| {
        let thread = start(scope, &there);
        let a = here();
        (a, thread.map_or_else(&there, join))
    })
}

fn start<'scope, R: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    work: impl FnOnce() -> R + Send + 'scope,
) -> Option<ScopedJoinHandle<'scope, R>> {
    Builder::new().spawn_scoped(scope, work).ok()
}

fn join<R>(thread: ScopedJoinHandle<'_, R>) -> R {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_the_order_of_the_items() {
        for count in [0, 1, 2, 255, 256, 257, 1000] {
            let items: Vec<usize> = (0..count).collect();
            assert_eq!(in_parallel(items.clone(), |item| item), items);
        }
        assert_eq!(beside(|| 1, || 2), (1, 2));
    }
}
