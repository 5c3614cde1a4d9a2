//! What the server counts and measures, for Prometheus. Where a figure means the same as one of vLLM's, it has that
//! name, so that its dashboards work.

use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::IntoResponse;
use metrics::{Counter, Gauge, Histogram, Key, Label, Level, Metadata, Recorder};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use mixtral_runtime::SessionStats;

use std::sync::Arc;

use crate::shared::Shared;

/// How often what was measured is sorted into buckets; until then each measurement takes memory.
pub(crate) const UPKEEP: Duration = Duration::from_secs(5);

/// Bounds of the buckets of times, in seconds: from a step of a small model to a long answer of a busy server.
const SECONDS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0, 160.0, 640.0, 2560.0,
];

/// Bounds of the buckets of tokens.
const TOKENS: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5];

/// How a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// A token or a text ended it.
    Stop,
    /// It has as many tokens as it may have.
    Length,
    /// The client went away, or its time was over.
    Abort,
    /// It failed.
    Error,
}

impl End {
    const ALL: [End; 4] = [End::Stop, End::Length, End::Abort, End::Error];

    /// vLLM's word for it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            End::Stop => "stop",
            End::Length => "length",
            End::Abort => "abort",
            End::Error => "error",
        }
    }
}

/// The figures.
pub struct Metrics {
    handle: PrometheusHandle,
    pub(crate) running: Gauge,
    pub(crate) waiting: Gauge,
    pub(crate) cache_use: Gauge,
    pub(crate) prefix_queries: Counter,
    pub(crate) prefix_hits: Counter,
    pub(crate) prompt_tokens: Counter,
    pub(crate) generated_tokens: Counter,
    ended: [Counter; 4],
    pub(crate) first_token: Histogram,
    pub(crate) between_tokens: Histogram,
    pub(crate) whole_answer: Histogram,
    pub(crate) tokens_of_prompt: Histogram,
    pub(crate) tokens_of_answer: Histogram,
}

impl Metrics {
    /// All figures at zero, with the model's name as their label.
    pub(crate) fn new(model: &str) -> Self {
        let buckets = [("_seconds", SECONDS), ("_tokens", TOKENS)];
        let builder = buckets.into_iter().fold(PrometheusBuilder::new(), |builder, (suffix, bounds)| {
            let with = builder.set_buckets_for_metric(Matcher::Suffix(suffix.to_owned()), bounds);
            with.expect("there are buckets")
        });
        let recorder = builder.build_recorder();
        let make = Make { recorder: &recorder, model };
        Metrics {
            running: make.gauge("vllm:num_requests_running", "Sequences that the engine computes."),
            waiting: make
                .gauge("vllm:num_requests_waiting", "Sequences that wait for a place or for room in the cache."),
            cache_use: make
                .gauge("vllm:kv_cache_usage_perc", "Part of the cache's blocks that sequences hold, from 0 to 1."),
            prefix_queries: make
                .counter("vllm:prefix_cache_queries_total", "Tokens of prompts looked for in the cache."),
            prefix_hits: make.counter("vllm:prefix_cache_hits_total", "Tokens of prompts found in the cache."),
            prompt_tokens: make.counter("vllm:prompt_tokens_total", "Tokens of the prompts that the session took."),
            generated_tokens: make.counter("vllm:generation_tokens_total", "Tokens generated."),
            ended: End::ALL.map(|end| {
                let what = "Sequences that ended, by why.";
                make.counter_with("vllm:request_success_total", what, "finished_reason", end.name())
            }),
            first_token: make.histogram(
                "vllm:time_to_first_token_seconds",
                "From the arrival of a request to the first token of a sequence.",
            ),
            between_tokens: make
                .histogram("vllm:inter_token_latency_seconds", "From one token of a sequence to the next."),
            whole_answer: make.histogram(
                "vllm:e2e_request_latency_seconds",
                "From the arrival of a request to the last token of a sequence.",
            ),
            tokens_of_prompt: make.histogram("vllm:request_prompt_tokens", "Tokens of a sequence's prompt."),
            tokens_of_answer: make.histogram("vllm:request_generation_tokens", "Tokens generated for a sequence."),
            handle: recorder.handle(),
        }
    }

    /// Counts a sequence that ended.
    pub(crate) fn end(&self, end: End) {
        self.ended[end as usize].increment(1);
    }

    /// Takes over what the session tells of itself.
    #[expect(clippy::cast_precision_loss, reason = "numbers of sequences and blocks are small")]
    pub(crate) fn session(&self, stats: &SessionStats) {
        self.running.set(stats.running as f64);
        self.waiting.set((stats.waiting + stats.swapped) as f64);
        self.cache_use.set(stats.used_blocks as f64 / stats.blocks.max(1) as f64);
        self.prefix_queries.absolute(stats.counters.prompt_tokens);
        self.prefix_hits.absolute(stats.counters.cached_tokens);
    }

    /// What Prometheus reads.
    pub(crate) fn text(&self) -> String {
        self.handle.render()
    }

    /// Sorts what was measured into buckets.
    pub(crate) fn upkeep(&self) {
        self.handle.run_upkeep();
    }
}

/// Makes figures.
struct Make<'a> {
    recorder: &'a PrometheusRecorder,
    model: &'a str,
}

const METADATA: Metadata<'static> = Metadata::new("mixtral_serve", Level::INFO, None);

impl Make<'_> {
    fn key(&self, name: &'static str) -> Key {
        Key::from_parts(name, vec![Label::new("model_name", self.model.to_owned())])
    }

    fn gauge(&self, name: &'static str, what: &'static str) -> Gauge {
        self.recorder.describe_gauge(name.into(), None, what.into());
        self.recorder.register_gauge(&self.key(name), &METADATA)
    }

    fn counter(&self, name: &'static str, what: &'static str) -> Counter {
        self.recorder.describe_counter(name.into(), None, what.into());
        self.recorder.register_counter(&self.key(name), &METADATA)
    }

    fn counter_with(
        &self,
        name: &'static str,
        what: &'static str,
        label: &'static str,
        value: &'static str,
    ) -> Counter {
        self.recorder.describe_counter(name.into(), None, what.into());
        let key = self.key(name).with_extra_labels(vec![Label::new(label, value)]);
        self.recorder.register_counter(&key, &METADATA)
    }

    fn histogram(&self, name: &'static str, what: &'static str) -> Histogram {
        self.recorder.describe_histogram(name.into(), None, what.into());
        self.recorder.register_histogram(&self.key(name), &METADATA)
    }
}

/// `/metrics`.
pub(crate) async fn render(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    ([(header::CONTENT_TYPE, kind)], shared.metrics.text())
}
